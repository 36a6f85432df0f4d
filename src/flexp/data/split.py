"""A client's rows divided into training, validation and test rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexp.data.seeding import generator
from flexp.errors import DataError


@dataclass(frozen=True)
class Split:
    """Row numbers, ascending; no number is in two of the lists."""

    train: list[int]
    validation: list[int]
    test: list[int]


def stratified_order(
    labels: Sequence[Hashable], rng: np.random.Generator, like: Mapping[Hashable, int] | None = None
) -> list[int]:
    """A random order of positions in which every prefix has nearly the label proportions of the whole.

    The r-th of n rows of a label (in random order) is sorted by (r + 1/2) / n: prefixes of any length are
    proportional to within one row of a label, and shorter ones are contained in longer ones.

    Args:
        like: labels and their counts elsewhere, whose proportions prefixes are to have as long as the labels last.
    """
    shuffled = [int(index) for index in rng.permutation(len(labels))]
    total = Counter(labels) if like is None else like
    seen: dict[Hashable, int] = {}
    key: dict[int, float] = {}
    for index in shuffled:
        label = labels[index]
        rank = seen.get(label, 0)
        seen[label] = rank + 1
        key[index] = (rank + 0.5) / total[label]
    return sorted(shuffled, key=key.__getitem__)  # stable: ties stay in random order


def split_client(
    name: str,
    rows: Sequence[int],
    labels: Sequence[Hashable] | None,
    *,
    test_fraction: float,
    validation_fraction: float,
    train_examples: int | None,
    test_examples: int | None,
    seed: int,
    test_rows: Sequence[int] | None = None,
    test_labels: Sequence[Hashable] | None = None,
    groups: Sequence[str] | None = None,
) -> Split:
    """Divide one client's ``rows``; stratified by ``labels`` (parallel to ``rows``) when there are any.

    The test rows depend on the seed, the client's name and the two test settings only: they stay the same
    whatever ``train_examples`` and ``validation_fraction`` are. Few-shot subsets keep the client's own label
    proportions, and a smaller one is part of every larger one. Validation rows are taken out of the few-shot
    subset: a client with ``train_examples`` = 32 has 32 labelled examples in all.

    Args:
        test_rows: rows of another source for testing; then all of ``rows`` are for training.
        test_labels: their labels, parallel.
        groups: parallel to ``rows``; rows of an equal group are on the same side. Whole groups are dealt out, so that
            fractions are met nearly; the numbers of examples are met exactly, in the client's label proportions.

    Raises:
        DataError: no row is left to train on, or none to test with.
    """
    if groups is not None:
        return _checked(_split_groups(), ...)
    if test_rows is None:
        order = _ordered(rows, labels, seed, name, "test")
        count = _share(len(rows), test_fraction)
        test, left = order[:count], sorted(order[count:])
    else:
        test, left = _ordered(test_rows, test_labels, seed, name, "test"), sorted(rows)
    test = test[:test_examples]
    by_row = None if labels is None else dict(zip(rows, labels, strict=True))
    order = _ordered(left, None if by_row is None else [by_row[row] for row in left], seed, name, "train")
    chosen = sorted(order[:train_examples])
    order = _ordered(chosen, None if by_row is None else [by_row[row] for row in chosen], seed, name, "validation")
    count = _share(len(chosen), validation_fraction)
    split = Split(sorted(order[count:]), sorted(order[:count]), sorted(test))
    tested = test_rows is not None or test_fraction > 0
    if not split.train or (tested and not split.test) or (validation_fraction > 0 and not split.validation):
        raise DataError(
            f"client {name!r} has {len(rows)} examples: {len(split.train)} to train, {len(split.validation)} to "
            f"validate, {len(split.test)} to test; give it more, leave it out with data.clients.names, or change "
            "data.test_fraction or data.validation_fraction"
        )
    return split


def _share(count: int, fraction: float) -> int:
    """``fraction`` of ``count``, rounded; but one at least where something was asked for and two are there."""
    share = int(count * fraction + 0.5)
    if 0.0 < fraction < 1.0 and count >= 2:
        return min(max(share, 1), count - 1)
    return share


def _ordered(rows: Sequence[int], labels: Sequence[Hashable] | None, seed: int, name: str, purpose: str) -> list[int]:
    order = stratified_order([0] * len(rows) if labels is None else labels, generator(seed, purpose, name))
    return [rows[index] for index in order]
