"""The statistics of a comparison, as pure functions of numbers.

A score is first averaged over a run's clients, then over the seeds: the seeds are the sample, so an interval says how
much of a difference is luck of partition, order and initialisation. What has a missing value (``None``: a client or a
seed whose score is not a number) has no mean: one without the failed ones would flatter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CONFIDENCE = 0.95
_SQUARED = 1e100
"""The square of more may be beyond all floats, as of a huge perplexity."""
ROUNDING = 1e-12
"""Differences of equal scores are zero only up to rounding."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` values and half the width of its confidence interval (``None``: one value has none)."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero; never with one value alone."""
        return self.half is not None and abs(self.mean) - self.half > ROUNDING


def interval(values: Iterable[float | None], confidence: float = CONFIDENCE) -> Interval | None:
    """The mean of ``values`` with Student's t interval on n − 1 degrees of freedom.

    ``None`` without any value, or when one is missing.
    """
    present = _present(values)
    if not present:
        return None
    n, middle = len(present), math.fsum(present) / len(present)
    if n == 1:
        return Interval(middle, None, 1)
    from scipy.special import stdtrit  # scipy takes a while to import

    largest = max(abs(value - middle) for value in present)
    unit = largest if largest > _SQUARED else 1.0
    variance = math.fsum(((value - middle) / unit) ** 2 for value in present) / (n - 1)
    quantile = float(stdtrit(n - 1, 0.5 + confidence / 2))
    return Interval(middle, unit * quantile * math.sqrt(variance / n), n)


def paired(
    reference: Mapping[int, float | None], other: Mapping[int, float | None], higher_is_better: bool
) -> Interval | None:
    """The difference of two methods over the seeds that both have, **positive where the reference is better**.

    That is reference − other for scores like accuracy, and other − reference for those like perplexity. Equal seeds
    share clients, splits and order, so what is common to both cancels (a paired t interval).
    """
    sign = 1.0 if higher_is_better else -1.0
    both = [(reference[seed], other[seed]) for seed in sorted(reference.keys() & other.keys())]
    return interval(None if mine is None or theirs is None else sign * (mine - theirs) for mine, theirs in both)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean over clients; ``None`` when there are none, or when one client's value is missing."""
    present = _present(values)
    return math.fsum(present) / len(present) if present else None


def worst_decile(scores: Iterable[float | None], higher_is_better: bool) -> float | None:
    """The mean of the worst 10 % of clients: ⌊n / 10⌋ of them, at least one. ``None`` when a score is missing."""
    present = _present(scores)
    if not present:
        return None
    ordered = sorted(present, reverse=not higher_is_better)
    return mean(ordered[: max(1, len(ordered) // 10)])


def _present(values: Iterable[float | None]) -> list[float]:
    """All of ``values``, or none when one is missing or not finite."""
    given = list(values)
    present = [float(value) for value in given if value is not None and math.isfinite(value)]
    return present if len(present) == len(given) else []
