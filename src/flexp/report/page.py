"""What every page has in common: one HTML file that holds everything it needs and loads nothing from anywhere.

Text is escaped here or by whoever calls; the page's content security policy forbids it to reach any host.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import plotly.io as pio
from plotly.offline import get_plotlyjs

from flexp.report import formats
from flexp.report.figures import Plot

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'unsafe-inline'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    )
)


def document(name: str, body: str, source: str, version: str, kind: str = "report") -> str:
    """The whole page as text, about 5 MB of which nearly all is plotly.js.

    Args:
        name: the title, as text.
        body: HTML.
        source: what the page was made from, as text.
        version: FlexP's, as text.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(name)} · FlexP {escape(kind)}</title>\n<style>\n{_asset('page.css')}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>\n{body}"
        f"<footer>Written by FlexP {escape(version)} from {escape(source)} alone. "
        "This page loads nothing from any other place.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def head(name: str, facts: Iterable[str], warning: str = "", kind: str = "report") -> str:
    """The title and a line of facts, all text; ``warning`` is HTML."""
    shown = f'<p class="warning">{warning}</p>\n' if warning else ""
    return (
        f'<header>\n<p class="kicker">FlexP {escape(kind)}</p>\n<h1>{escape(name)}</h1>\n'
        f'<p class="facts">{escape(" · ".join(facts))}</p>\n{shown}</header>\n'
    )


def card(label: str, value: str, detail: str) -> str:
    """One number with what it is; all text."""
    return (
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>\n'
    )


def cards(made: Iterable[str]) -> str:
    return f'<div class="cards">\n{"".join(made)}</div>\n'


def table(headers: Sequence[str], rows: Iterable[tuple[Sequence[str], str]], words: Collection[int] = ()) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        headers: text.
        rows: the cells as HTML, the first one names the row; and the row's class, or nothing.
        words: columns that hold words, not numbers: they start at the left and may be broken.
    """
    styles = [' class="words"' if index and index in words else "" for index in range(len(headers))]
    titles = "".join(
        f'<th scope="col"{style}>{escape(title)}</th>' for title, style in zip(headers, styles, strict=True)
    )
    lines = []
    for cells, style in rows:
        others = "".join(f"<td{style}>{cell}</td>" for cell, style in zip(cells[1:], styles[1:], strict=True))
        kind = f' class="{style}"' if style else ""
        lines.append(f'<tr{kind}><th scope="row">{cells[0]}</th>{others}</tr>\n')
    return (
        f'<div class="scroll"><table>\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{''.join(lines)}</tbody>\n</table></div>\n"
    )


def section(title: str, caption: str, content: str) -> str:
    """A titled part of the page; title and caption are text, the content HTML."""
    line = f'<p class="caption">{escape(caption)}</p>\n' if caption else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{line}{content}</section>\n"


def folded(title: str, content: str) -> str:
    """A part of the page that is opened on demand; the title is text, the content HTML."""
    return f"<section>\n<details>\n<summary>{escape(title)}</summary>\n{content}</details>\n</section>\n"


def plots(made: Iterable[Plot], narrow: Sequence[str] = ()) -> str:
    """The figures; those whose keys are in ``narrow`` share a row on a wide screen."""
    parts = []
    for plot in made:
        figure = pio.to_html(
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
        wide = "" if plot.key in narrow else " wide"
        parts.append(
            f'<section class="plot{wide}">\n<h2>{escape(plot.title)}</h2>\n'
            f'<p class="caption">{escape(plot.caption)}</p>\n{figure}\n</section>\n'
        )
    return f'<div class="grid">\n{"".join(parts)}</div>\n'


def notes(lines: Iterable[str]) -> str:
    """A list of remarks, given as text."""
    items = "".join(f"<li>{escape(note)}</li>\n" for note in lines)
    return section("Notes", "", f'<ul class="notes">\n{items}</ul>\n')


def machine(facts: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    """What a run was made with; nothing when nothing is known."""
    shown = {**_flat(facts), **_flat(versions)}
    if not shown:
        return ""
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>\n" for key, value in shown.items())
    return section("Machine and versions", "", f"<dl>\n{items}</dl>\n")


def config(resolved: Any | None, title: str = "Resolved configuration") -> str:
    """The configuration, folded away; nothing when there is none."""
    if resolved is None:
        return ""
    text = escape(json.dumps(resolved, indent=2, ensure_ascii=False))
    return folded(title, f"<pre>{text}</pre>\n")


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        str(key).replace("_", " "): formats.size(value)
        if str(key).endswith("_bytes") and isinstance(value, int | float)
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
        if value is not None
    }


def _asset(name: str) -> str:
    return (files("flexp.report") / name).read_text(encoding="utf-8")
