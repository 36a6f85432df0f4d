"""The tables of a comparison in Markdown, in LaTeX and for the terminal. Whatever they hold is shown literally."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flexp.comparison.report.grids import DROPPED, Grid, difference, dropped_lines, marked, score
from flexp.comparison.report.results import checked, results
from flexp.report import formats

MOST_ROWS = 40
"""Of a table in LaTeX, so that it stays on one page."""
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


def terminal_table(comparison: Mapping[str, Any]) -> Table:
    """The scores and the main costs, about 80 columns wide when names are short; units stand in the titles."""
    comparison = checked(comparison)
    metric, seeds = str(comparison["metric"]), len(comparison["seeds"])
    found = results(comparison)
    clock = any(result.virtual_seconds is not None for result in found)
    unit = " %" if formats.is_fraction(metric) else ""
    notes = [
        f"Mean over {seeds} seed{'' if seeds == 1 else 's'} ± 95 % interval. "
        f"Ahead: by how much {comparison['reference']} is better, paired; * excludes 0.",
        *(f"{DROPPED} {line}" for line in dropped_lines(found)),
    ]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(f"{comparison['name']}: {metric} after the last round, on test data"),
        title_justify="left",
        caption=Text("\n".join(notes)),
        caption_justify="left",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Method", overflow="fold", min_width=8)
    titles = [
        f"Own\ndata{unit}",
        f"Worst\ndecile{unit}",
        f"Every-\nbody's{unit}",
        "Ahead",
        "Up and\ndown",
        "Peak\nmemory",
    ]
    for title in [*titles, *(["Virtual\ntime"] if clock else [])]:
        table.add_column(Text(title), justify="right", no_wrap=True)
    for result in found:
        total = None if result.bytes_up is None or result.bytes_down is None else result.bytes_up + result.bytes_down
        worst = None if result.worst is None else result.worst.mean
        cells = [
            marked(result),
            score(result.personal, metric, seeds),
            formats.score(worst, metric),
            score(result.everybody, metric, seeds),
            "" if result.is_reference else difference(result.difference, metric, seeds),
            formats.size(total),
            formats.size(result.memory),
            *([formats.seconds(result.virtual_seconds)] if clock else []),
        ]
        table.add_row(*(Text(cell.replace(" %", "")) for cell in cells), style="bold" if result.is_reference else None)
    return table


def markdown(name: str, grids: Iterable[Grid]) -> str:
    """All tables in Markdown, ending with a newline."""
    parts = [f"# {_plain(name)}"]
    for grid in grids:
        sides = "".join("---|" if index in grid.text else "---:|" for index in range(len(grid.headers)))
        lines = [_line([_plain(title) for title in grid.headers]), f"|{sides}"]
        for index, row in enumerate(grid.rows):
            cells = [_plain(cell) for cell in row]
            lines.append(_line([f"**{cell}**" if index in grid.bold and cell else cell for cell in cells]))
        parts += [f"## {_plain(grid.title)}", _plain(grid.caption), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def latex(name: str, grids: Iterable[Grid]) -> str:
    """All tables in LaTeX, a float for every 40 rows; a document that has them needs ``booktabs`` and ``graphicx``."""
    parts = ["% Needs \\usepackage[T1]{fontenc}, {textcomp}, {booktabs} and {graphicx}."]
    for grid in grids:
        columns = "".join("l" if index in grid.text else "r" for index in range(len(grid.headers)))
        head = " & ".join(
            _tex_title(title, "l" if index in grid.text else "r") for index, title in enumerate(grid.headers)
        )
        body = []
        for index, row in enumerate(grid.rows):
            cells = [_tex(cell) for cell in row]
            body.append(" & ".join(rf"\textbf{{{cell}}}" if index in grid.bold and cell else cell for cell in cells))
        for start in range(0, len(body), MOST_ROWS):
            caption = f"{name}: {grid.title}. {grid.caption}" if not start else f"{name}: {grid.title}, continued."
            lines = "".join(f"{line} \\\\\n" for line in body[start : start + MOST_ROWS])
            parts.append(
                f"\\begin{{table}}\n\\centering\n\\caption{{{_tex(caption)}}}\n"
                f"\\label{{tab:flexp-{grid.key}{f'-{start}' if start else ''}}}\n"
                # Shrunk to the text's width only where it is wider.
                "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
                f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}\n\\toprule\n{head} \\\\\n\\midrule\n{lines}"
                "\\bottomrule\n\\end{tabular}}\n\\end{table}\n"
            )
    return "\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line."""
    for sign in "\\`*_[]<>|#~&$":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _tex(text: str) -> str:
    """``text`` so that LaTeX shows it as it is, on one line."""
    shown, before = [], ""
    for sign in " ".join(text.split()):
        if sign.isprintable():
            shown.append("{}-" if sign == before == "-" else _LATEX.get(sign, sign))  # "--" would be a dash
            before = sign
    # The end of a table line, two backslashes, would take a star or a bracket for its own.
    return "{}" + "".join(shown) if shown and shown[0] in ("*", "[") else "".join(shown)


def _tex_title(text: str, side: str) -> str:
    """A column's title on two lines where it is long, so that the column need not be wider than its numbers."""
    words = text.split()
    if len(text) <= 12 or len(words) < 2:
        return _tex(text)
    where = min(range(1, len(words)), key=lambda place: abs(len(" ".join(words[:place])) - len(text) / 2))
    first, second = _tex(" ".join(words[:where])), _tex(" ".join(words[where:]))
    return rf"\shortstack[{side}]{{{first}\\{second}}}"
