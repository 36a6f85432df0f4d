"""Scores from answers: F1, areas under ROC curves, confusion, errors of numbers, entities, words in common.

A client scores on its device, and scikit-learn would take 140 MB of it; tests hold these few lines to scikit-learn.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST_CLASSES = 32
"""With more classes no table of confusion is kept."""


def confusion(right: Sequence[int], given: Sequence[int], classes: int) -> Ints:
    """How often class ``given`` (column) was the answer where ``right`` (row) was right, (C, C)."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (np.asarray(right, dtype=np.int64), np.asarray(given, dtype=np.int64)), 1)
    return table


def f1_by_class(table: Ints) -> list[float | None]:
    """2·tp / (2·tp + fp + fn) of each class; ``None`` of one that was neither right nor given."""
    return f1_of(np.diag(table), table.sum(0), table.sum(1))


def f1_of(hits: Ints, given: Ints, right: Ints) -> list[float | None]:
    """F1 of each class from how often it was hit, given and right."""
    return [2.0 * int(h) / int(g + r) if g + r else None for h, g, r in zip(hits, given, right, strict=True)]


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that there are."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def area(scores: Floats, positive: npt.NDArray[np.bool_]) -> float | None:
    """The area under the ROC curve: how likely a positive scores above a negative, ties counting half; ``None`` where
    one of both is missing or a score is not a number."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives or not np.isfinite(scores).all():
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[place]  # of equals the mean
    return float((ranks[positive].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def mean_area(probabilities: Floats, right: npt.NDArray[np.bool_]) -> float | None:
    """The mean :func:`area` of the classes (columns) that have positives and negatives."""
    return mean_of([area(probabilities[:, k], right[:, k]) for k in range(right.shape[1])])


def class_scores(probabilities: Sequence[Sequence[float]], right: Sequence[int]) -> dict[str, float | None]:
    """``macro_f1`` and ``auc`` of one class for each example; with two classes, of the second one."""
    values = np.asarray(probabilities, dtype=np.float64)
    classes = values.shape[1]
    table = confusion(right, values.argmax(1).tolist(), classes)
    hot = np.eye(classes, dtype=bool)[np.asarray(right)]
    found = area(values[:, 1], hot[:, 1]) if classes == 2 else mean_area(values, hot)
    return {"macro_f1": mean_of(f1_by_class(table)), "auc": found}


def several_scores(probabilities: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> dict[str, Any]:
    """``micro_f1``, ``macro_f1``, ``exact_match`` and ``auc`` of any number of classes for each example, given from a
    probability of one half on."""
    values, hot = np.asarray(probabilities, dtype=np.float64), np.asarray(right, dtype=np.float64) > 0.5
    given = values >= 0.5
    counts = (given & hot).sum(0), given.sum(0), hot.sum(0)
    total = f1_of(*(count.sum(keepdims=True) for count in counts))[0]
    return {
        "micro_f1": 0.0 if total is None else total,
        "macro_f1": mean_of(f1_of(*counts)),
        "exact_match": float((given == hot).all(1).mean()),
        "auc": mean_area(values, hot),
    }


def several_f1(probabilities: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> list[float | None]:
    """F1 of each class, likewise."""
    given, hot = np.asarray(probabilities) >= 0.5, np.asarray(right) > 0.5
    return f1_of((given & hot).sum(0), given.sum(0), hot.sum(0))


def number_scores(given: Sequence[float], right: Sequence[float]) -> dict[str, float | None]:
    """``rmse``, ``mae``, ``r2`` (1 − squared error / variance: 0 is what always answering the mean gets) and
    ``pearson``; the last two ``None`` where all numbers are equal."""
    y, p = np.asarray(right, dtype=np.float64), np.asarray(given, dtype=np.float64)
    spread, own = float(((y - y.mean()) ** 2).sum()), float(((p - p.mean()) ** 2).sum())
    squared = float(((y - p) ** 2).sum())
    together = float(((y - y.mean()) * (p - p.mean())).sum())
    return {
        "rmse": math.sqrt(squared / len(y)),
        "mae": float(np.abs(y - p).mean()),
        "r2": 1.0 - squared / spread if spread else None,
        "pearson": together / math.sqrt(spread * own) if spread and own else None,
    }


PREFIXES = tuple("BIESLUM")
"""What a tag of an entity begins with: alone, or before ``-`` and the entity's kind. Any other is outside."""


def prefix_of(tag: str) -> str | None:
    """Its one of :data:`PREFIXES`; ``None``: it is outside of entities, such as ``O``, ``_`` or ``OTHER``."""
    prefix = tag.partition("-")[0]
    return prefix if prefix in PREFIXES else None


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first, end) of the entities that tags such as ``B-PER`` mark, read as the CoNLL evaluation does: an ``I-``
    of another kind, or after none, begins one."""
    found, kind, start, closed = set(), "", 0, True
    for index, tag in enumerate([*tags, "O"]):
        prefix, own = prefix_of(tag), tag.partition("-")[2]
        inside = prefix is not None
        begins = inside and (prefix in ("B", "S", "U") or closed or own != kind)
        if not closed and (begins or not inside):
            found.add((kind, start, index))
            closed = True
        if begins:
            kind, start = own, index
        closed = closed if not inside else False
        if prefix in ("E", "S", "L", "U"):
            found.add((kind, start, index + 1))
            closed = True
    return found


def entity_scores(given: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """``f1``, ``precision`` and ``recall`` of whole entities over all examples. ``None`` where there is none to find
    and none was found, as :func:`f1_by_class` has it; else a share of nothing is 0, as in seqeval."""
    hits = answers = wanted = 0
    for mine, theirs in zip(given, right, strict=True):
        one, other = entities(mine), entities(theirs)
        hits, answers, wanted = hits + len(one & other), answers + len(one), wanted + len(other)
    if not answers + wanted:
        return {"f1": None, "precision": None, "recall": None}
    return {
        "f1": 2 * hits / (answers + wanted),
        "precision": hits / answers if answers else 0.0,
        "recall": hits / wanted if wanted else 0.0,
    }


def plain_words(text: str) -> list[str]:
    """Words without case, signs and English articles, as SQuAD's evaluation compares answers."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def words_in_common(given: str, right: str) -> float:
    """F1 of the words of two answers; where one is empty, whether both are."""
    one, other = plain_words(given), plain_words(right)
    same = sum((Counter(one) & Counter(other)).values())
    if not one or not other:
        return float(one == other)
    return 2 * same / (len(one) + len(other))
