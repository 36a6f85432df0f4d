"""Texts from templates: HTML pages that hold everything they need and load nothing, and tables in Markdown and LaTeX.

Whatever a template is given is escaped for the format that it writes, without being asked to.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.io as pio
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from flexp.report import formats
from flexp.report.figures import Plot
from flexp.report.tables import Table

ROWS_A_FLOAT = 40
"""Of a table in LaTeX, so that it stays on one page."""

_WHOLE = re.compile(
    r" (?=[±%→=×]|[kMGTP]?B\b|(?:[kMGsh]|min)\b|\d+\))"  # before a sign, a unit, the end of a bracket
    r"|(?<=[±→=×]) |(?<=\bround) |(?<=\bof) (?=\d)"
)
"""Spaces at which a number would be torn apart."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": "{'}",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "†": r"\dag{}",
    "\u202f": r"\,",
    "\u00a0": "~",
}


def page(template: str, package: str = "flexp.report", **content: Any) -> str:
    """An HTML page, about 5 MB of which nearly all is plotly.js; its content security policy forbids any host.

    Args:
        template: one that extends ``page.html.j2``, of the folder ``templates`` of ``package`` or of this one.
        content: what the template and ``page.html.j2`` show.

    Raises:
        KeyError: the template asks for what ``content`` does not have.
    """
    try:
        return _html(package).get_template(template).render(plotly=Markup(get_plotlyjs()), **content)
    except UndefinedError as error:
        raise KeyError(str(error)) from error


def markdown(name: str, tables: Sequence[Table]) -> str:
    """All tables in Markdown, under a title of their own."""
    return _plain(_markdown_text).get_template("tables.md.j2").render(name=name, tables=tables)


def latex(name: str, tables: Sequence[Table]) -> str:
    """All tables in LaTeX, a float for every 40 rows; a document needs ``booktabs`` and ``graphicx`` for them."""
    signs = {"variable_start_string": "<<", "variable_end_string": ">>"}
    signs |= {"block_start_string": "<%", "block_end_string": "%>"}
    signs |= {"comment_start_string": "<#", "comment_end_string": "#>"}
    environment = _plain(_latex_text, **signs)
    return environment.get_template("tables.tex.j2").render(name=name, tables=tables, most=ROWS_A_FLOAT, halved=_halved)


@functools.cache
def _html(package: str) -> Environment:
    places = ChoiceLoader([PackageLoader(place) for place in dict.fromkeys((package, "flexp.report"))])
    made = _environment(places, autoescape=True)
    made.filters |= {"unbroken": _unbroken, "drawn": _drawn, "facts": _facts, "pretty": _pretty}
    shown = (
        formats.change,
        formats.count,
        formats.cut,
        formats.inside,
        formats.is_fraction,
        formats.plural,
        formats.score,
    )
    made.filters |= {function.__name__: function for function in (*shown, formats.seconds, formats.size)}
    return made


def _plain(escape: Callable[[str], str], **signs: str) -> Environment:
    return _environment(PackageLoader("flexp.report"), finalize=lambda value: escape(str(value)), **signs)


def _environment(loader: Any, **options: Any) -> Environment:
    return Environment(
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _drawn(plot: Plot) -> Markup:
    """The figure as HTML; plotly.js stands in the page's head."""
    return Markup(
        pio.to_html(
            plot.figure,
            include_plotlyjs=False,
            full_html=False,
            div_id=f"plot-{plot.key}",
            default_width="100%",
            default_height=f"{plot.figure.layout.height}px",
            config={
                "responsive": True,
                "displaylogo": False,
                "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
                "toImageButtonOptions": {"format": "svg", "filename": f"flexp-{plot.key}"},
            },
        )
    )


def _unbroken(text: str) -> str:
    """A cell that may be broken between its parts, but not inside ``83.8 ± 1.9 %`` or ``(n = 4)``."""
    return _WHOLE.sub("\u00a0", text)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """What is known, in words: names without underscores, bytes in their unit."""
    return {
        str(key).replace("_", " "): formats.size(value)
        if str(key).endswith("_bytes") and isinstance(value, int | float)
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
        if value is not None
    }


def _markdown_text(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line."""
    return " ".join(re.sub(r"([\\`*_\[\]<>|#~&$])", r"\\\1", text).split())


def _latex_text(text: str) -> str:
    """``text`` so that LaTeX shows it as it is, on one line."""
    shown, before = [], ""
    for sign in " ".join(text.split()):
        if sign.isprintable():
            shown.append("{}-" if sign == before == "-" else _LATEX.get(sign, sign))  # "--" would be a dash
            before = sign
    # The end of a table line, two backslashes, would take a star or a bracket for its own.
    return "{}" + "".join(shown) if shown and shown[0] in ("*", "[") else "".join(shown)


def _halved(title: str) -> tuple[str, ...]:
    """A column's title on two lines where it is long, so that the column need not be wider than its numbers."""
    words = title.split()
    if len(title) <= 12 or len(words) < 2:
        return (title,)
    where = min(range(1, len(words)), key=lambda place: abs(len(" ".join(words[:place])) - len(title) / 2))
    return " ".join(words[:where]), " ".join(words[where:])
