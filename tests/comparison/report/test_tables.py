from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from flexp.comparison.report.tables import lead, tables, terminal_table
from flexp.comparison.statistics import Interval
from flexp.report.pages import ROWS_A_FLOAT, latex, markdown
from flexp.report.tables import Table

from . import synthetic
from .test_results import BY_HAND


def shown(comparison: dict[str, Any], width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(terminal_table(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def grid(comparison: dict[str, Any], key: str) -> Table:
    return next(table for table in tables(comparison) if table.key == key)


def test_a_full_comparison_has_every_table_with_a_row_a_method() -> None:
    made = {table.key: table for table in tables(synthetic.comparison(devices=True))}
    assert list(made) == ["scores", "costs", "equal-bytes", "equal-time", "settings", "trials"]
    for key in ("scores", "costs", "equal-bytes", "equal-time", "settings"):
        assert len(made[key].rows) == len(synthetic.METHODS)
        assert list(made[key].bold) == [0]
    assert len(made["trials"].rows) == 7 * 6
    assert all(len(row) == len(table.headers) for table in made.values() for row in table.rows)


def test_cells_by_hand() -> None:
    rows = grid(synthetic.tiny(BY_HAND), "scores").rows
    assert rows[0] == [
        "mine",
        "83.3 ± 19.0 %",
        "80.0 ± 24.8 %",
        "41.7 ± 9.5 %",
        "0.500 ± 0.000",
        "83.3 ± 19.0 %, round 1",
        "reference",
    ]
    assert rows[1][-1] == "+5.0 ± 0.0*"


def test_one_seed_is_told_and_marks_nothing() -> None:
    row = grid(synthetic.tiny({"mine": [[0.9]], "other": [[0.5]]}), "scores").rows[1]
    assert row[1] == "50.0 % (n = 1)"
    assert row[-1] == "+40.0 (n = 1)"


def test_a_missing_run_is_told() -> None:
    made = synthetic.tiny({"mine": [[0.9], [0.8], [0.7]], "other": [[0.5], [0.4]]})
    row = grid(made, "scores").rows[1]
    assert row[1].endswith("% (n = 2)")
    assert "(n = 2)" in row[-1]


def test_runs_that_are_missing_are_told_as_they_are() -> None:
    some = " ".join(shown(synthetic.tiny({"mine": [[0.9], [0.8]], "other": [[0.5]]})).split())
    assert "Runs are missing of: other. Their means are over the other runs, which may flatter them." in some
    none = " ".join(shown(synthetic.tiny({"mine": [[0.9]], "other": []})).split())
    assert "No run is finished of: other." in none
    assert "other runs" not in none


def test_who_diverged_is_named_and_has_no_score() -> None:
    made = synthetic.tiny({"mine": [[0.9, 0.8], [0.8, 0.9]], "other": [[0.5, 0.6], [0.95, None]]})
    made["methods"][1]["runs"][1]["not_finite"] = ["c1"]
    line = "Diverged, so that scores after the last round are missing: other (seed 1)."
    assert line in " ".join(shown(made).split())
    scores = grid(made, "scores")
    assert (scores.rows[1][1:3], scores.rows[1][-1]) == (["–", "–"], "–")
    views = [table for table in tables(made) if table.key in ("equal-time", "equal-bytes")]
    assert [(table.rows[1][1], line in table.caption) for table in (scores, *views)] == [("–", True)] * 3


def test_the_sign_for_perplexity_is_explained() -> None:
    made = grid(synthetic.comparison(metric="perplexity"), "scores")
    assert "the sign is turned, as a lower perplexity is better" in made.caption
    assert "Lower is better" in made.caption
    assert all(row[-1].startswith("+") for row in made.rows[1:])
    assert "%" not in "".join(cell for row in made.rows for cell in row)


def test_a_reference_that_is_worse_trails() -> None:
    assert lead("mine", Interval(0.073, 0.01, 5), "accuracy", 5) == "mine leads by 7.3 ± 1.0 points, paired"
    assert lead("mine", Interval(-0.073, 0.01, 5), "accuracy", 5) == "mine trails by 7.3 ± 1.0 points, paired"
    assert lead("mine", Interval(-0.3, None, 1), "loss", 5) == "mine trails by 0.30 (n = 1), paired; may be chance"
    assert lead("mine", None, "accuracy", 5) == "not comparable with mine"


def test_a_round_picked_on_test_data_is_called_optimistic() -> None:
    made = synthetic.comparison()
    assert "picked on validation data" in grid(made, "scores").caption
    made["methods"][0]["runs"][0]["picked_on"] = "test"
    assert "hence optimistic" in grid(made, "scores").caption


def test_dropped_clients_are_told_in_every_text() -> None:
    made = synthetic.comparison(devices=True)
    told = "4 of 8 clients dropped: need 316 MB"
    assert told in shown(made)
    assert told in markdown("x", tables(made))
    assert told in latex("x", tables(made))
    assert grid(made, "scores").rows[2][0] == "fedavg †"
    assert grid(made, "costs").rows[2][-1] == "4 of 8 dropped: need 316 MB"
    assert grid(synthetic.comparison(), "costs").rows[2][-1] == "all take part"


def test_the_terminal_shows_all_in_80_columns() -> None:
    text = shown(synthetic.comparison(), width=80)
    assert "83.8 ± 1.9" in text
    assert "+8.3 ± 1.0*" in text
    assert "1.09 GB" in text
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_without_devices_and_memory_there_are_dashes_and_no_clock() -> None:
    made = grid(synthetic.comparison(), "costs")
    assert "Virtual time" not in made.headers
    assert made.rows[-1][4] == "–"  # pretrained: memory was not measured
    assert "Virtual time" in grid(synthetic.comparison(devices=True), "costs").headers


def test_hostile_names_stay_text() -> None:
    name = r"[red]x|y_z&50%\input{/etc/passwd}$^~#<b>`"
    made = synthetic.comparison(methods=(name, "[b]--*"), name=name)
    assert "[red]x|y_z" in shown(made, 400)
    text = markdown(name, tables(made))
    assert r"\[red\]x\|y\_z\&50%\\input{/etc/passwd}\$^\~\#\<b\>\`" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    tex = latex(name, tables(made))
    assert r"x\textbar{}y\_z\&50\%\textbackslash{}input\{/etc/passwd\}\$\textasciicircum{}\textasciitilde{}\#" in tex
    assert r"\input" not in tex
    assert "\n{}[b]-{}-* &" in tex  # after a line's end, [ and * would be arguments of it


def test_markdown_has_as_many_cells_in_every_line_of_a_table() -> None:
    for table in markdown("x", tables(synthetic.comparison())).split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_latex_tables_are_closed_and_short() -> None:
    made = tables(synthetic.comparison())
    tex = latex("x", made)
    parts = tex.split(r"\begin{table}")[1:]
    assert len(parts) == len(made) + 1  # 42 trials take two
    for part in parts:
        for once in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}", r"\end{table}", r"\caption{"):
            assert part.count(once) == 1
        columns = re.search(r"\{@\{\}([lr]+)@\{\}\}", part)
        assert columns is not None
        body = part.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
        assert 0 < len(body) <= ROWS_A_FLOAT
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns[1]) - 1 for line in body)
    assert "±" not in tex
    assert "−" not in tex


def test_the_majority_is_a_row_with_the_scores_and_test_examples_are_counted() -> None:
    made = synthetic.tiny({"mine": [[0.9, 0.8], [0.8, 0.8]], "other": [[0.5, 0.4], [0.5, 0.5]]})
    for method in made["methods"]:
        for run in method["runs"]:
            run["majority"] = {"personal": {"c0": 0.6, "c1": 0.5}, "global": {"c0": 0.4, "c1": 0.4}}
            for place, client in enumerate(run["clients"]):
                client["test_examples"] = 30 + place
    scores = grid(made, "scores")
    assert scores.rows[-1] == ["majority", "55.0 ± 0.0 %", "50.0 ± 0.0 %", "40.0 ± 0.0 %", "", "", ""]
    assert "A client has 30–31 test examples." in scores.caption
    assert "majority 55.0 ± 0.0" in re.sub(" +", " ", shown(made))
