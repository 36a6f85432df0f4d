"""Timing two things in turn, so that their ratio does not depend on how busy the machine is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WARM_UP = 3
"""Pairs that are run first and not counted."""


@dataclass(frozen=True)
class Paired:
    """``ratio`` is the median of second ÷ first over the pairs, with its ``quartiles``; seconds are medians."""

    ratio: float
    quartiles: list[float]
    first: float
    second: float

    def facts(self, first: str, second: str) -> dict[str, Any]:
        """For a result: the ratio and the seconds of both, by their names."""
        ratio = {"ratio": self.ratio, "ratio_quartiles": self.quartiles}
        return ratio | {f"{first}_seconds": self.first, f"{second}_seconds": self.second}

    def rows(self, first: str, second: str) -> list[tuple[str, str]]:
        """The same to be read."""
        low, high = self.quartiles
        return [
            (f"{second} ÷ {first} (median of pairs)", f"{self.ratio:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            (f"{first} step", f"{1e3 * self.first:.1f} ms"),
            (f"{second} step", f"{1e3 * self.second:.1f} ms"),
        ]


def paired(
    first: Callable[[], None], second: Callable[[], None], pairs: int, clock: Callable[[], float] | None = None
) -> Paired:
    """Time ``pairs`` of calls by ``clock`` (``None``: seconds of wall), after a warm-up."""
    clock = clock or time.perf_counter
    for _ in range(WARM_UP):
        first()
        second()
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs):
        # Every other pair starts with the second: what comes later may find warmer caches.
        for step, found in ((first, seconds[0]), (second, seconds[1]))[:: 1 if number % 2 else -1]:
            began = clock()
            step()
            found.append(clock() - began)
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*seconds, strict=True)], n=4)
    return Paired(middle, [low, high], statistics.median(seconds[0]), statistics.median(seconds[1]))
