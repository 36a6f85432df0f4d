from __future__ import annotations

import io

from rich.console import Console

from flexp.report import formats, pages, tables

from . import synthetic


def shown(summary: dict, width: int = 160) -> str:  # type: ignore[type-arg]
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.client_table(summary))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def markdown(summary: dict) -> str:  # type: ignore[type-arg]
    return pages.markdown("x", [tables.clients(summary)])


def test_rows_end_with_mean_and_worst() -> None:
    summary = synthetic.summary()
    made = tables.clients(summary)
    assert [row[0] for row in made.rows] == [*synthetic.NAMES, "Mean", "Worst"]
    assert list(made.bold) == [8, 9]
    mean, worst = made.rows[-2:]
    before, last = (summary["scores"][when]["personal_mean"] for when in ("before", "last"))
    assert mean[4] == f"{100 * before:.1f} → {100 * last:.1f} %"
    assert made.changes[8, 4] == (f"+{100 * (last - before):.1f}", "up")
    assert (worst[2], worst[8], worst[10]) == ("96", formats.size(78_000_000 + 7 * 9_000_000), "330 MB")


def test_who_was_left_out_is_marked_and_costs_nothing() -> None:
    """What its device would have needed is no cost, and no part of the mean."""
    summary = synthetic.summary()
    whole = tables.clients(summary)
    made = tables.clients({**summary, "dropped": [{"name": synthetic.NAMES[-1]}]})
    assert made.rows[7][0] == f"{synthetic.NAMES[-1]} †"
    assert made.rows[7][8:] == ["–", "–", "–"]
    assert made.rows[8][:8] == whole.rows[8][:8]  # its score counts
    sent = [client["bytes_up"] for client in summary["clients"][:-1]]
    assert made.rows[8][8] == formats.size(sum(sent) / 7)
    assert "† left out, as its device cannot hold" in made.caption
    assert "left out" not in whole.caption
    text = shown({**summary, "dropped": [{"name": synthetic.NAMES[-1]}]})
    both = [client["bytes_up"] + client["bytes_down"] for client in summary["clients"][:-1]]
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines[synthetic.NAMES[-1]].rstrip().endswith("–      –")
    assert formats.size(sum(both) / 7) in lines["Mean"]
    assert "† left out" in text


def test_test_counts_and_the_majority_stand_beside_every_accuracy() -> None:
    made = tables.clients(synthetic.summary())
    assert made.headers[3:8:2] == ["Test examples", "Majority, own", "Majority, everybody's"]
    assert [row[3] for row in made.rows] == [*(str(120 + 11 * k) for k in range(8)), "158", "120"]
    shares = [f"{51 + k}.0 %" for k in range(8)] + ["54.5 %", ""]
    assert [row[5] for row in made.rows] == [row[7] for row in made.rows] == shares
    assert "everybody's test data are 1268 examples" in made.caption
    text = shown(synthetic.summary(), width=80)
    assert "96/120" in text
    assert " 58.0 " in text


def test_the_terminal_shows_all_in_80_columns() -> None:
    text = shown(synthetic.summary(), width=80)
    assert "sentiment-8: accuracy before → after training" in text
    assert "52.6 → 78.7" in text
    assert "155 MB" in text  # up and down
    assert "330 MB" in text
    assert "…" not in text


def test_an_unfinished_run_and_perplexity() -> None:
    text = shown(synthetic.summary(metric="perplexity", finished=False))
    assert "This run is not finished." in text
    assert "Perplexity" in text
    assert "%" not in text


def test_names_are_shown_as_they_are() -> None:
    assert "a %_b" in shown(synthetic.summary(clients=("a %_b", *synthetic.NAMES[1:])))


def test_names_with_markup_are_shown_literally() -> None:
    summary = synthetic.summary(clients=("[red]x|y", "*b*"))
    assert "[red]x|y" in shown(summary)
    text = markdown(summary)
    assert r"\[red\]x\|y" in text
    assert r"\*b\*" in text


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = [line for line in markdown(synthetic.summary()).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(synthetic.NAMES) + 2
    assert {line.count("|") for line in lines} == {12}
    assert lines[-1].startswith("| **Worst** |")


def test_missing_values_are_dashes() -> None:
    summary = synthetic.summary(diary=[])
    for client in summary["clients"]:
        client["peak_memory_bytes"] = None
    last = markdown(summary).splitlines()[-2]
    assert last.count("–") == 3
