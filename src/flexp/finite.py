"""What scores say of a model whose answers are no finite numbers: nothing, and that they are missing.

The arg max of NaN is a class all the same, and would be counted right or wrong. NaN is never an answer. An infinite
loss may be one: where logits of -inf say that something cannot be, and it is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NOT_FINITE = "not_finite"
"""Of scores: for how many examples the model answers with numbers that are not finite; all scores are ``None``."""
IMPOSSIBLE = "impossible"
"""Of scores: how many examples' right answer the model takes for impossible, so that the loss is infinite (``null`` in
files); the other scores stand."""
UNDEFINED = "undefined"
"""Of scores: names of those that the examples do not define, as an F1 where nothing is to be found."""
FACTS = ("n", "majority", "tokens", "questions", NOT_FINITE)
"""What is true of the examples, whatever a model answers."""
TABLES = ("f1_by_class", "confusion")
"""Entries that are no figures."""

SIDES = {"personal": "its own test data", "global": "everybody's", "validation": "its validation data"}
_SHOWN = 6


def is_broken(scores: Mapping[str, Any]) -> bool:
    """Whether they are of a model that does not answer with finite numbers. Those of older diaries do not say: there
    the loss is missing, and is no reason to trust what stands beside it."""
    return bool(scores.get(NOT_FINITE)) or ("loss" in scores and scores["loss"] is None and not scores.get(IMPOSSIBLE))


def without_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The same without any score: ``None`` for each, no tables."""
    return {key: value if key in FACTS else None for key, value in scores.items() if key not in TABLES}


def cleaned(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a diary, without the scores of what :func:`is_broken`."""
    if record.get("kind") != "eval":
        return record
    broken = {side: record[side] for side in SIDES if isinstance(record.get(side), dict) and is_broken(record[side])}
    return {**record, **{side: without_scores(scores) for side, scores in broken.items()}}


def told(number: int, scored: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line of those clients whose models do not answer with finite numbers after round ``number``; none if all do.

    Args:
        scored: by client and side (``personal``, ``global``, ``validation``) what
            :func:`~flexp.data.scores.evaluate` gave.
    """
    broken = {name: [side for side in SIDES if is_broken(sides.get(side) or {})] for name, sides in scored.items()}
    names = [name for name, sides in broken.items() if sides]
    if not names:
        return []
    data = [SIDES[side] for side in SIDES if any(side in sides for sides in broken.values())]
    one = len(names) == 1
    if not one:
        data = [text.replace("its", "their") for text in data]
    counted = ""
    if one:
        own = scored[names[0]][broken[names[0]][0]]
        counted = f" for {own[NOT_FINITE]} of {own['n']} examples" if NOT_FINITE in own and "n" in own else ""
    when = f"after round {number}" if number else "before training"
    mend = (
        "lower train.personal.lr or train.shared.lr, set their clip, or use model.dtype = 'float32'"
        if number
        else "look at the model's weights, or use model.dtype = 'float32'"
    )
    return [
        f"{_listed(names)}, {when}: {'its model answers' if one else 'their models answer'} with numbers that are not "
        f"finite{counted}, so there are no scores on {' and '.join(data)}; {mend}"
    ]


def warnings(records: Iterable[Mapping[str, Any]], clients: Iterable[str]) -> list[str]:
    """What a diary says of models that do not answer with finite numbers: a line a round, each client in the last round
    in which its model did not."""
    last: dict[str, Mapping[str, Any]] = {}
    known = set(clients)
    for record in records:
        if record.get("kind") == "eval" and record["client"] in known and told(0, {record["client"]: record}):
            last[record["client"]] = record
    rounds: dict[int, dict[str, Mapping[str, Any]]] = {}
    for name, record in last.items():
        rounds.setdefault(int(record["round"]), {})[name] = record
    return [line for number in sorted(rounds) for line in told(number, rounds[number])]


def broken_at_end(records: Iterable[Mapping[str, Any]], clients: Iterable[str]) -> list[str]:
    """Those of ``clients`` whose models did not answer with finite numbers when they were scored last."""
    last = {record["client"]: record for record in records if record.get("kind") == "eval"}
    return [name for name in clients if name in last and told(0, {name: last[name]})]


def many(names: list[str]) -> str:
    """Whose models answer: ``client a: its model answers``."""
    return f"{_listed(names)}: {'its model answers' if len(names) == 1 else 'their models answer'}"


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return f"client {names[0]}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"clients {', '.join(names[:_SHOWN])}{more}"
