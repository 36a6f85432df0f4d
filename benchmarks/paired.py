"""Timing two things in turn, so that their ratio does not depend on how busy the machine is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP = 3
"""Pairs that are run first and not counted."""


@dataclass(frozen=True)
class Paired:
    """``ratio`` is the median of second ÷ first over the pairs, with its ``quartiles``; seconds are medians."""

    ratio: float
    quartiles: list[float]
    first: float
    second: float


def paired(first: Callable[[], None], second: Callable[[], None], pairs: int) -> Paired:
    """Time ``pairs`` of calls, after a warm-up."""
    for _ in range(WARM_UP):
        first()
        second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        # Every other pair starts with the second: what comes later may find warmer caches.
        for step, found in ((first, seconds[0]), (second, seconds[1]))[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            step()
            found.append(time.perf_counter() - began)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*seconds, strict=True)], n=4)
    return Paired(middle, [low, high], statistics.median(seconds[0]), statistics.median(seconds[1]))
