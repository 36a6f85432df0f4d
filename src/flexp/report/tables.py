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
DROPPED = "†"
"""Beside clients whose devices cannot hold what they would train, and methods that have such."""
LEFT_OUT = f"{DROPPED} left out, as its device cannot hold what it would train: scored with what it has."


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

    def terminal(self, headers: Iterable[str], dense: bool = False) -> RichTable:
        """About 80 columns wide when names are short: ``headers`` may be broken and say the unit in place of the cells.

        Cells are shown literally: markup in them has no effect. ``dense``: one space between columns instead of two.
        """
        shown = RichTable(
            box=box.SIMPLE_HEAD,
            title=Text(self.title),
            title_justify="left",
            caption=Text(self.caption) if self.caption else None,
            caption_justify="left",
            pad_edge=False,
            show_edge=False,
            padding=0 if dense else (0, 1, 0, 0),
        )
        first, *others = headers
        shown.add_column(first, overflow="fold", min_width=8)
        for title in others:
            shown.add_column(Text(title), justify="right", no_wrap=True)
        for index, row in enumerate(self.rows):
            shown.add_row(
                *(Text(cell if column in self.words else cell.replace(" %", "")) for column, cell in enumerate(row)),
                style="bold" if index in self.bold else None,
                end_section=index not in self.bold and index + 1 in self.bold,
            )
        return shown


def clients(summary: Mapping[str, Any]) -> Table:
    """The scores and costs of a run: one row a client, then *Mean* and *Worst*.

    Worst is the worst score, the fewest examples and the highest cost of any client, each on its own. Where there are
    right answers, the score of the majority stands beside each score. Clients that were left out, as their devices
    cannot hold what they would train, are marked, and have no costs.
    """
    metric, higher = str(summary["metric"]), bool(summary["higher_is_better"])
    known, scores, compared = summary["clients"], summary["scores"], _has_majority(summary)
    out = _left_out(summary)
    taking = [client for client in known if client["name"] not in out]
    pairs = [[(client["before"][side], client["last"][side]) for side in SIDES] for client in known]
    majorities = [[client["majority"][side] for side in SIDES] for client in known] if compared else []
    lines = [
        (
            [str(client["name"]) + (f" {DROPPED}" if client["name"] in out else ""), formats.cut(client.get("cut"))],
            [client["train_examples"], client["test_examples"]],
            [None if client["name"] in out else client.get(key) for key in COSTS],
        )
        for client in known
    ]
    for over, fewest, highest in (("mean", _mean, _mean), ("worst", min, max)):
        pairs.append([(scores["before"][f"{side}_{over}"], scores["last"][f"{side}_{over}"]) for side in SIDES])
        counts = [_over(fewest, known, key) for key in ("train_examples", "test_examples")]
        lines.append(([over.capitalize(), ""], counts, [_over(highest, taking, key) for key in COSTS]))
    if compared:
        majorities += [[_mean([shares[place] for shares in majorities]) for place in range(2)], [None, None]]
    rows, step = [], 2 if compared else 1
    for line, (names, counts, costs) in enumerate(lines):
        shown = [formats.pair(*pair, metric) for pair in pairs[line]]
        if compared:
            beside = ["" if share is None else formats.score(share, metric) for share in majorities[line]]
            shown = [cell for both in zip(shown, beside, strict=True) for cell in both]
        rows.append(
            [
                *names,
                *(formats.count(count if count is None else round(count)) for count in counts),
                *shown,
                *map(formats.size, costs),
            ]
        )
    unit = "in points" if formats.is_fraction(metric) else "of the score"
    name, everybody = formats.name(metric), summary.get("test_examples")
    titles = [f"{name}, own test data", f"{name}, everybody's"]
    if compared:
        titles = [titles[0], "Majority, own", titles[1], "Majority, everybody's"]
    return Table(
        key="clients",
        title="Clients",
        caption=f"{name} before → after training (change {unit})"
        + (", and of whoever always gives the most frequent answer" if compared else "")
        + (f"; everybody's test data are {formats.plural(everybody, 'example')}" if everybody else "")
        + f". Worst: the {'lowest' if higher else 'highest'} score, the fewest examples and the highest cost of any "
        "client." + (f" {LEFT_OUT}" if out else ""),
        headers=["Client", "Cut", "Private examples", "Test examples", *titles, "Sent up", "Sent down", "Peak memory"],
        rows=rows,
        bold=range(len(known), len(rows)),
        changes={
            (line, 4 + place * step): _change(before, after, metric, higher)
            for line, sides in enumerate(pairs)
            for place, (before, after) in enumerate(sides)
            if before is not None and after is not None
        },
    )


def client_table(summary: Mapping[str, Any]) -> RichTable:
    """The same for the terminal, where the traffic of both directions is one column."""
    metric = str(summary["metric"])
    unit = f"{formats.name(metric)} %" if formats.is_fraction(metric) else formats.name(metric)
    made = clients(summary)
    out = _left_out(summary)
    traffic = [{"both": None if client["name"] in out else _traffic(client)} for client in summary["clients"]]
    totals = [*(client["both"] for client in traffic), *(_over(how, traffic, "both") for how in (_mean, max))]
    rows = [
        [*row[:2], f"{row[2]}/{row[3]}", *row[4:-3], formats.size(total), row[-1]]
        for row, total in zip(made.rows, totals, strict=True)
    ]
    made = replace(
        made,
        rows=rows,
        title=f"{summary['name']}: {formats.inside(metric)} before → after training, on test data",
        caption=" ".join([LEFT_OUT] * bool(out) + ["This run is not finished."] * (not summary["finished"])),
    )
    beside = ["Major-\nity"] if _has_majority(summary) else []
    titles = ("Client", "Cut", "Train/\ntest", f"{unit}\nown data", *beside, f"{unit}\neverybody's", *beside)
    return made.terminal((*titles, "Up and\ndown", "Peak\nmemory"), dense=bool(beside))


def _left_out(summary: Mapping[str, Any]) -> set[str]:
    return {str(one["name"]) for one in summary.get("dropped") or ()}


def _traffic(client: Mapping[str, Any]) -> float | None:
    sent, received = (client.get(key) for key in COSTS[:2])
    return None if sent is None or received is None else float(sent + received)


def _has_majority(summary: Mapping[str, Any]) -> bool:
    return bool(summary["clients"]) and all(client.get("majority") for client in summary["clients"])


def _over(how: Callable[[list[float]], float], clients: Iterable[Mapping[str, Any]], key: str) -> float | None:
    known = [client[key] for client in clients if client.get(key) is not None]
    return how(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _change(before: float, after: float, metric: str, higher: bool) -> tuple[str, str]:
    text = formats.change(before, after, metric)
    return text, "same" if text == "±0" else "up" if (after > before) == higher else "down"
