"""The Pareto front of round time, expected accuracy loss and bytes, by ε-constraints.

Bounds on accuracy and bytes are swept between the ends of what is possible; for each pair the fastest plan within them
is solved for exactly (Haimes et al., 1971). Every point is a plan that no other one beats in all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexp.planner.fleet import Weights
from flexp.planner.plan import Plan, Setting, counts
from flexp.planner.problem import Measures
from flexp.planner.solve import Solution, solve

FASTEST = Weights(round=1.0, time=1e-3, energy=0.0, bytes=1e-3, accuracy=1e-3)
"""Time, and the rest so far as to break ties."""


@dataclass(frozen=True)
class Point:
    """A plan on the front."""

    setting: Setting
    solution: Solution

    @property
    def measures(self) -> Measures:
        return self.solution.measures

    def values(self) -> tuple[float, float, float]:
        """Round seconds, loss, bytes."""
        return self.measures.round_seconds, self.measures.loss, self.measures.bytes


def front(plan: Plan, steps: int = 6) -> list[Point]:
    """The front, from the fastest plan on; at most ``steps`` bounds on accuracy times ``steps`` on bytes a rank."""
    found = [point for setting in plan.settings for point in _sweep(setting, steps)]
    return efficient(found)


def efficient(points: Sequence[Point]) -> list[Point]:
    """Those that no other one equals or beats in everything; of equals one."""
    kept: list[Point] = []
    for point in sorted(points, key=Point.values):
        own = point.values()
        if not any(all(a <= b * (1 + 1e-9) for a, b in zip(other.values(), own, strict=True)) for other in kept):
            kept.append(point)
    return kept


def _sweep(setting: Setting, steps: int) -> list[Point]:
    best = {
        name: _solved(setting, Weights.model_validate({**_NOTHING, name: 1.0, "time": 1e-6}), {})
        for name in ("accuracy", "bytes")
    }
    fastest = _solved(setting, FASTEST, {})
    found = [point for point in (fastest, *best.values()) if point is not None]
    if fastest is None or None in best.values():
        return found
    losses = _between(best["accuracy"].measures.loss, max(p.measures.loss for p in found), steps)  # type: ignore[union-attr]
    sizes = _between(best["bytes"].measures.bytes, max(p.measures.bytes for p in found), steps)  # type: ignore[union-attr]
    for loss in losses:
        for size in sizes:
            point = _solved(setting, FASTEST, {"accuracy": loss, "bytes": size})
            if point is not None:
                found.append(point)
    return found


_NOTHING = dict.fromkeys(("round", "time", "energy", "bytes", "accuracy"), 0.0)


def _solved(setting: Setting, weights: Weights, limits: dict[str, float]) -> Point | None:
    solution = solve(replace(setting.problem, weights=weights, limits=limits or None))
    if solution is None:
        return None
    # measured as the plan's own objective has it
    measures = setting.problem.measure(counts(setting.problem, solution))
    return Point(setting, replace(solution, measures=measures))


def _between(low: float, high: float, steps: int) -> list[float]:
    if high <= low:
        return [low]
    return [low + (high - low) * index / (steps - 1) for index in range(steps)]
