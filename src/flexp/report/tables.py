"""A table of text cells, which the terminal, Markdown, LaTeX and HTML show; and that of a run's clients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from flexp.report import formats
from flexp.report.summary import SIDES

COSTS = ("bytes_up", "bytes_down", "peak_memory_bytes")


@dataclass(frozen=True)
class Table:
    """Text by rows; the first column names the row.

    Attributes:
        bold: rows that stand out.
        words: columns that hold words rather than numbers.
        details: it may be folded away.
        changes: by (row, column), what is written small beside a cell, and whether it is ``up`` (good), ``down`` or
            ``same``.
    """

    key: str
    title: str
    caption: str
    headers: list[str]
    rows: list[list[str]]
    bold: Collection[int] = ()
    words: Collection[int] = (0,)
    details: bool = False
    changes: Mapping[tuple[int, int], tuple[str, str]] = field(default_factory=dict)

    def terminal(self, headers: Iterable[str]) -> RichTable:
        """About 80 columns wide when names are short: ``headers`` may be broken and say the unit in place of the cells.

        Cells are shown literally: markup in them has no effect.
        """
        shown = RichTable(
            box=box.SIMPLE_HEAD,
            title=Text(self.title),
            title_justify="left",
            caption=Text(self.caption) if self.caption else None,
            caption_justify="left",
            pad_edge=False,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        first, *others = headers
        shown.add_column(first, overflow="fold", min_width=8)
        for title in others:
            shown.add_column(Text(title), justify="right", no_wrap=True)
        for index, row in enumerate(self.rows):
            shown.add_row(
                *(Text(cell.replace(" %", "")) for cell in row),
                style="bold" if index in self.bold else None,
                end_section=index not in self.bold and index + 1 in self.bold,
            )
        return shown


def clients(summary: Mapping[str, Any]) -> Table:
    """The scores and costs of a run: one row a client, then *Mean* and *Worst*.

    Worst is the worst score, the fewest examples and the highest cost of any client, each on its own.
    """
    metric, higher = str(summary["metric"]), bool(summary["higher_is_better"])
    known, scores = summary["clients"], summary["scores"]
    rows = [
        [
            str(client["name"]),
            formats.cut(client.get("cut")),
            formats.count(client["train_examples"]),
            *(formats.pair(client["before"][side], client["last"][side], metric) for side in SIDES),
            *(formats.size(client.get(key)) for key in COSTS),
        ]
        for client in known
    ]
    pairs = [[(client["before"][side], client["last"][side]) for side in SIDES] for client in known]
    for over, fewest, highest in (("mean", _mean, _mean), ("worst", min, max)):
        pairs.append([(scores["before"][f"{side}_{over}"], scores["last"][f"{side}_{over}"]) for side in SIDES])
        rows.append(
            [
                over.capitalize(),
                "",
                formats.count(_over(fewest, known, "train_examples")),
                *(formats.pair(*pair, metric) for pair in pairs[-1]),
                *(formats.size(_over(highest, known, key)) for key in COSTS),
            ]
        )
    unit = "in points" if formats.is_fraction(metric) else "of the score"
    name = metric.capitalize()
    titles = [f"{name}, own test data", f"{name}, everybody's"]
    return Table(
        key="clients",
        title="Clients",
        caption=f"{name} before → after training (change {unit}). Worst: the {'lowest' if higher else 'highest'} "
        "score, the fewest examples and the highest cost of any client.",
        headers=["Client", "Cut", "Private examples", *titles, "Sent up", "Sent down", "Peak memory"],
        rows=rows,
        bold=range(len(known), len(rows)),
        changes={
            (line, place): _change(before, after, metric, higher)
            for line, sides in enumerate(pairs)
            for place, (before, after) in enumerate(sides, start=3)
            if before is not None and after is not None
        },
    )


def client_table(summary: Mapping[str, Any]) -> RichTable:
    """The same for the terminal."""
    metric = str(summary["metric"])
    unit = f"{metric.capitalize()} %" if formats.is_fraction(metric) else metric.capitalize()
    made = replace(
        clients(summary),
        title=f"{summary['name']}: {metric} before → after training, on test data",
        caption="" if summary["finished"] else "This run is not finished.",
    )
    titles = ("Client", "Cut", "Private\nexamples", f"{unit}\nown data", f"{unit}\neverybody's")
    return made.terminal((*titles, "Sent\nup", "Sent\ndown", "Peak\nmemory"))


def _over(how: Callable[[list[float]], float], clients: Iterable[Mapping[str, Any]], key: str) -> float | None:
    known = [client[key] for client in clients if client.get(key) is not None]
    return how(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _change(before: float, after: float, metric: str, higher: bool) -> tuple[str, str]:
    text = formats.change(before, after, metric)
    return text, "same" if text == "±0" else "up" if (after > before) == higher else "down"
