"""The table of a run, one row a client, then mean and worst: for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from flexp.report import formats

Pair = tuple[float | None, float | None]


@dataclass(frozen=True)
class Row:
    """One line; ``personal`` and ``everybody`` are scores (before, after training)."""

    name: str
    cut: str
    examples: float | None
    personal: Pair
    everybody: Pair
    bytes_up: float | None
    bytes_down: float | None
    memory: float | None
    total: bool = False  # a row over all clients

    def cells(self, metric: str) -> list[str]:
        """What is shown, in the order of :func:`headers`."""
        return [
            self.name,
            self.cut,
            formats.count(self.examples),
            formats.pair(*self.personal, metric),
            formats.pair(*self.everybody, metric),
            formats.size(self.bytes_up),
            formats.size(self.bytes_down),
            formats.size(self.memory),
        ]


def headers(metric: str) -> list[str]:
    """The columns' titles; the first is text, the second a cut, the others numbers."""
    return [
        "Client",
        "Cut",
        "Private examples",
        f"{metric.capitalize()}, own test data",
        f"{metric.capitalize()}, everybody's",
        "Sent up",
        "Sent down",
        "Peak memory",
    ]


def rows(summary: Mapping[str, Any]) -> list[Row]:
    """One row a client, then *Mean* and *Worst*.

    Worst is the worst score, the fewest examples and the highest cost of any client, each on its own.
    """
    clients = [_client_row(client) for client in summary["clients"]]
    scores = summary["scores"]

    def pair(side: str) -> Pair:
        return scores["before"][side], scores["last"][side]

    def over(name: str, side: str, examples: _Reduce, cost: _Reduce) -> Row:
        return Row(
            name=name,
            cut="",
            examples=_reduce(examples, (row.examples for row in clients)),
            personal=pair(f"personal_{side}"),
            everybody=pair(f"global_{side}"),
            bytes_up=_reduce(cost, (row.bytes_up for row in clients)),
            bytes_down=_reduce(cost, (row.bytes_down for row in clients)),
            memory=_reduce(cost, (row.memory for row in clients)),
            total=True,
        )

    return [*clients, over("Mean", "mean", _mean, _mean), over("Worst", "worst", min, max)]


def client_table(summary: Mapping[str, Any]) -> Table:
    """The table for the terminal, 80 columns wide when names are short or can be folded.

    Names are shown literally: markup in them has no effect.
    """
    metric = str(summary["metric"])
    lines = rows(summary)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(f"{summary['name']}: {metric} before → after training, on test data"),
        title_justify="left",
        caption=None if summary["finished"] else Text("This run is not finished."),
        caption_justify="left",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Client", overflow="fold", min_width=8)
    unit = f"{metric.capitalize()} %" if formats.is_fraction(metric) else metric.capitalize()
    for title in ("Cut", "Private\nexamples", f"{unit}\nown data", f"{unit}\neverybody's"):
        table.add_column(Text(title), justify="right", no_wrap=True)
    for title in ("Sent\nup", "Sent\ndown", "Peak\nmemory"):
        table.add_column(title, justify="right", no_wrap=True)
    for index, row in enumerate(lines):
        style = "bold" if row.total else None
        end = index + 1 < len(lines) and lines[index + 1].total and not row.total
        table.add_row(*(Text(cell.removesuffix(" %")) for cell in row.cells(metric)), style=style, end_section=end)
    return table


def markdown(summary: Mapping[str, Any]) -> str:
    """The same table in Markdown, ending with a newline."""
    metric = str(summary["metric"])
    titles = headers(metric)
    lines = [_markdown_line(titles), "|---|" + "---:|" * (len(titles) - 1)]
    for row in rows(summary):
        cells = [_plain(cell) for cell in row.cells(metric)]
        lines.append(_markdown_line([f"**{cell}**" if row.total and cell else cell for cell in cells]))
    return "\n".join(lines) + "\n"


_Reduce = Callable[[list[float]], float]


def _client_row(client: Mapping[str, Any]) -> Row:
    before, last = client["before"], client["last"]
    return Row(
        name=str(client["name"]),
        cut=formats.cut(client.get("cut")),
        examples=client["train_examples"],
        personal=(before["personal"], last["personal"]),
        everybody=(before["global"], last["global"]),
        bytes_up=client.get("bytes_up"),
        bytes_down=client.get("bytes_down"),
        memory=client.get("peak_memory_bytes"),
    )


def _reduce(how: _Reduce, values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return how(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """``text`` so that Markdown shows it as it is, on one line."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
