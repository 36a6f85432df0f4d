"""Means, intervals and differences over seeds: pure functions of ``comparison.json``'s values.

A score counts each client the same. What cannot be known (a client without a score, one seed only) is ``None``: a mean
without the failed client would flatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from scipy import stats

What = Literal["personal", "worst_decile", "global"]
"""Mean over clients on their own test data, of the worst tenth of them, and mean on everybody's."""

Interval = tuple[float | None, float | None]
"""Mean, and half the width of its 95 % confidence interval."""


def client_mean(scores: Mapping[str, float | None]) -> float | None:
    """Mean over clients; None if there is none, or one has no score."""
    values = [value for value in scores.values() if value is not None]
    return math.fsum(values) / len(values) if values and len(values) == len(scores) else None


def worst_decile(scores: Mapping[str, float | None], higher_is_better: bool) -> float | None:
    """Mean of the worst tenth of the clients, rounded down but one at least."""
    values = [value for value in scores.values() if value is not None]
    if not values or len(values) < len(scores):
        return None
    worst = sorted(values, reverse=not higher_is_better)[: max(1, len(values) // 10)]
    return math.fsum(worst) / len(worst)


def of_scores(at: Mapping[str, Any], what: What, higher_is_better: bool) -> float | None:
    """``what`` of an entry of ``rounds``, or of ``before``."""
    if what == "global":
        return client_mean(at["global"])
    return client_mean(at["personal"]) if what == "personal" else worst_decile(at["personal"], higher_is_better)


def last_means(method: Mapping[str, Any], what: What, higher_is_better: bool) -> dict[int, float | None]:
    """Seed → ``what`` at the last evaluated round of each of the method's runs."""
    return {
        int(run["seed"]): of_scores(run["rounds"][-1], what, higher_is_better) if run["rounds"] else None
        for run in method["runs"]
    }


def mean_ci(values: Sequence[float | None], confidence: float = 0.95) -> Interval:
    """Mean and half-width of its confidence interval by Student's t with n − 1 degrees of freedom.

    ``(None, None)`` if a value is missing; the half-width of one value alone is ``None``.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    count, mean = len(known), math.fsum(known) / len(known)
    if count == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (count - 1))
    return mean, float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * deviation / math.sqrt(count)


def differences(one: Mapping[int, float | None], other: Mapping[int, float | None]) -> dict[int, float]:
    """Seed → ``one`` − ``other``, for the seeds for which both are known."""
    result = {}
    for seed, value in one.items():
        against = other.get(seed)
        if value is not None and against is not None:
            result[seed] = value - against
    return result


def paired(reference: Mapping[str, Any], other: Mapping[str, Any], what: What, higher_is_better: bool) -> Interval:
    """The difference reference − other over equal seeds at the last round: mean and half-width."""
    both = differences(last_means(reference, what, higher_is_better), last_means(other, what, higher_is_better))
    return mean_ci(list(both.values()))
