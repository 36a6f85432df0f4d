"""All scores of a task as tables, in a report and in the terminal."""

from __future__ import annotations

from flexp.report.metrics import Record
from flexp.report.scores import of_clients, score_tables

ONE = {
    **{"loss": 0.5, "n": 10, "accuracy": 0.8, "majority": 0.6, "macro_f1": 0.75, "auc": 0.9},
    **{"f1_by_class": {"no": 0.8, "yes": None}, "confusion": [[5, 1], [1, 3]]},
}
OTHER = {**ONE, "accuracy": 0.5, "auc": None, "f1_by_class": {"no": 0.4, "yes": 0.6}, "confusion": [[2, 2], [3, 3]]}


def test_every_score_stands_in_a_table() -> None:
    scores, f1, confusion = score_tables({"a": ONE, "b": OTHER}, "accuracy", "Client", "here")
    assert scores.headers == ["Client", "Examples", "Accuracy", "Loss", "Majority", "Macro F1", "AUC"]
    assert scores.rows[0] == ["a", "10", "80.0 %", "0.50", "60.0 %", "75.0 %", "0.90"]
    assert scores.rows[1][-1] == "–"
    assert (f1.headers, f1.rows) == (["Class", "a", "b"], [["no", "80.0 %", "40.0 %"], ["yes", "–", "60.0 %"]])
    assert (confusion.headers, confusion.rows) == (["Right", "no", "yes"], [["no", "7", "3"], ["yes", "4", "6"]])
    (numbers,) = score_tables({"a": {"loss": 1.0, "n": 3, "rmse": 1.5, "r2": None}}, "rmse", "Client", "here")
    assert numbers.headers == ["Client", "Examples", "RMSE", "Loss", "R²"]


def test_a_report_has_what_a_client_scored_last() -> None:
    records: list[Record] = [
        {"kind": "eval", "round": number, "client": name, "personal": scores}
        for number, scores in ((0, OTHER), (1, ONE))
        for name in ("north", "<b>")
    ]
    tables = of_clients([*records, {"kind": "round", "round": 1}], "accuracy")
    assert [row[:3] for row in tables[0].rows] == [["north", "10", "80.0 %"], ["<b>", "10", "80.0 %"]]
    assert of_clients([], "accuracy") == []
