from __future__ import annotations

import io

from rich.console import Console

from flexp.report import tables

from . import synthetic


def shown(summary: dict, width: int = 160) -> str:  # type: ignore[type-arg]
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.client_table(summary))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_rows_end_with_mean_and_worst() -> None:
    summary = synthetic.summary()
    rows = tables.rows(summary)
    assert [row.name for row in rows] == [*synthetic.NAMES, "Mean", "Worst"]
    mean, worst = rows[-2:]
    assert mean.personal == (summary["scores"]["before"]["personal_mean"], summary["scores"]["last"]["personal_mean"])
    assert worst.examples == 96
    assert worst.bytes_up == 78_000_000 + 7 * 9_000_000
    assert worst.memory == 330_000_000


def test_the_terminal_shows_all_in_80_columns() -> None:
    text = shown(synthetic.summary(), width=80)
    assert "sentiment-8: accuracy before → after training" in text
    assert "52.6 → 78.7" in text
    assert "78.0 MB" in text
    assert "330 MB" in text
    assert "…" not in text


def test_an_unfinished_run_and_perplexity() -> None:
    text = shown(synthetic.summary(metric="perplexity", finished=False))
    assert "This run is not finished." in text
    assert "Perplexity" in text
    assert "%" not in text


def test_names_with_markup_are_shown_literally() -> None:
    summary = synthetic.summary(clients=("[red]x|y", "*b*"))
    assert "[red]x|y" in shown(summary)
    text = tables.markdown(summary)
    assert r"\[red\]x\|y" in text
    assert r"\*b\*" in text


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = tables.markdown(synthetic.summary()).splitlines()
    assert len(lines) == 2 + len(synthetic.NAMES) + 2
    assert {line.count("|") for line in lines} == {9}
    assert lines[-1].startswith("| **Worst** |")


def test_missing_values_are_dashes() -> None:
    summary = synthetic.summary(diary=[])
    for client in summary["clients"]:
        client["peak_memory_bytes"] = None
    last = tables.markdown(summary).splitlines()[-2]
    assert last.count("–") == 3
