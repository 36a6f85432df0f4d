"""Rows that must stay together (``data.group``): the sentences of a document, the pictures of a patient.

Rows of one document resemble each other. With some in training and some in test, a model is rewarded for knowing the
document; groups are therefore dealt out whole, and the counts that were asked for are only approached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import numpy as np

from flexp.errors import DataError

T = TypeVar("T")
ByRow: TypeAlias = Sequence[T] | Mapping[int, T]
"""Something that is looked up by row number."""

_NONE = 0.5  # stands for a wanted count of zero, which would weigh infinitely


def deal(
    rows: Sequence[int],
    groups: ByRow[str],
    kinds: ByRow[Hashable],
    wanted: Sequence[Mapping[Hashable, float]],
    rng: np.random.Generator,
) -> list[list[int]]:
    """Divide ``rows`` in ``len(wanted)`` parts, whole groups each, with nearly the ``wanted`` rows of every kind.

    Large groups go first, equally large ones in random order, each to the part where the sum of
    (rows - wanted)² / wanted over the kinds grows least. No part stays empty while another has two groups.

    Args:
        groups: the group of every row number; rows that share it stay together.
        kinds: the kind (label) of every row number.
        wanted: for every part the rows of each kind; they add up to those of ``rows``.

    Returns:
        The row numbers of every part, ascending.
    """
    members: dict[str, list[int]] = {}
    for row in sorted(rows):
        members.setdefault(groups[row], []).append(row)
    names = list(members)
    names = [names[index] for index in rng.permutation(len(names))]
    names.sort(key=lambda name: -len(members[name]))
    parts: list[list[str]] = [[] for _ in wanted]
    lack = [dict(part) for part in wanted]
    for name in names:
        counts = Counter(kinds[row] for row in members[name])
        costs = [
            sum(n * (n - 2 * left.get(kind, 0)) / (part.get(kind, 0) or _NONE) for kind, n in counts.items())
            for part, left in zip(wanted, lack, strict=True)
        ]
        best = costs.index(min(costs))
        parts[best].append(name)
        for kind, n in counts.items():
            lack[best][kind] = lack[best].get(kind, 0) - n
    for part in parts:
        rich = max(parts, key=len)
        if not part and len(rich) > 1:
            part.append(rich.pop())  # its smallest
    return [sorted(row for name in part for row in members[name]) for part in parts]


def shares(kinds: Iterable[Hashable], fractions: Sequence[float]) -> list[dict[Hashable, float]]:
    """What :func:`deal` is to aim at where all parts are alike: ``fractions`` of the rows of each kind."""
    counts = Counter(kinds)
    return [{kind: fraction * count for kind, count in counts.items()} for fraction in fractions]


def check_whole(parts: Mapping[str, Sequence[int]], groups: Sequence[str]) -> None:
    """Check that no group has rows in two parts.

    Raises:
        DataError: one has; the message names it and the parts.
    """
    owner: dict[str, str] = {}
    for part, rows in parts.items():
        for row in rows:
            if owner.setdefault(groups[row], part) != part:
                raise DataError(
                    f"the data.group {groups[row]!r} has rows of two clients, {owner[groups[row]]!r} and {part!r}: "
                    "give each client's groups names of their own, or divide by another data.clients.by"
                )


def check_apart(
    train: Mapping[str, Sequence[int]],
    groups: Sequence[str],
    test: Mapping[str, Sequence[int]],
    test_groups: Sequence[str],
) -> None:
    """Check that no group has rows both in the clients' ``train`` and in their ``test`` from a separate source.

    Raises:
        DataError: one has; the message names it and counts the others.
    """
    tested = {test_groups[row] for rows in test.values() for row in rows}
    both = tested & {groups[row] for rows in train.values() for row in rows}
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise DataError(
            f"the data.group {min(both)!r}{more} is in data.source and in data.test_source: remove it from one of them"
        )
