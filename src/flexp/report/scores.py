"""All the scores of a task as tables: its figures, F1 of each class, and who was taken for whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexp.finite import IMPOSSIBLE, NOT_FINITE, TABLES, UNDEFINED
from flexp.report import formats
from flexp.report.metrics import Record
from flexp.report.tables import Table

_COUNTS = ("n", "questions", "tokens", NOT_FINITE, IMPOSSIBLE)


def score_tables(found: Mapping[str, Mapping[str, Any]], metric: str, who: str, what: str) -> list[Table]:
    """Tables of what :func:`flexp.data.scores.evaluate` gave; one where there are figures alone.

    Args:
        found: scores by what was scored, in order.
        who: what was scored, the first column's title.
        what: on which data, for the captions.
    """
    keys = [key for key in _united(found.values()) if key not in (*TABLES, UNDEFINED, metric)]
    order = [*(["n"] if "n" in keys else []), metric, *(key for key in keys if key != "n")]
    rows = [[name, *(_shown(key, scores.get(key), metric) for key in order)] for name, scores in found.items()]
    titles = [formats.name(key) for key in order]
    tables = [Table("scores", "Scores", f"Of each task's scores, {what}.", [who, *titles], rows)]
    by_class = {name: scores["f1_by_class"] for name, scores in found.items() if scores.get("f1_by_class")}
    classes = list(_united(by_class.values()))
    if by_class:
        shares = [[label, *(formats.score(own.get(label), "f1") for own in by_class.values())] for label in classes]
        caption = f"F1, {what}; – where a class was neither right nor given."
        tables.append(Table("f1", "F1 by class", caption, ["Class", *by_class], shares, details=len(classes) > 12))
    squares = [scores["confusion"] for scores in found.values() if scores.get("confusion")]
    if squares and all(len(square) == len(classes) for square in squares):
        together = [[sum(cells) for cells in zip(*lines, strict=True)] for lines in zip(*squares, strict=True)]
        counted = [[label, *map(str, line)] for label, line in zip(classes, together, strict=True)]
        caption = f"How often each class (column) was given where another (row) was right, {what}, all together."
        headers = ["Right", *classes]
        tables.append(Table("confusion", "Confusion", caption, headers, counted, details=len(classes) > 12))
    return tables


def of_clients(records: Iterable[Record], metric: str) -> list[Table]:
    """Of a run's diary: each client's personal model on its own test data, when it was scored last; none where there is
    nothing that the table of clients does not say."""
    last: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if record.get("kind") == "eval" and record.get("personal"):
            last[str(record["client"])] = record["personal"]
    if not set(_united(last.values())) - {metric, "majority", "loss", "n"}:
        return []
    return score_tables(last, metric, "Client", "on a client's own test data after the last round")


def _shown(key: str, value: Any, metric: str) -> str:
    if key in _COUNTS:
        return formats.count(value)
    return formats.score(value, metric if key == "majority" else key)


def _united(values: Iterable[Mapping[str, Any]]) -> Sequence[str]:
    return list(dict.fromkeys(key for one in values for key in one))
