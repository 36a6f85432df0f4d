"""A comparison's methods at equal examples, equal bytes and equal time.

The functions read the runs of ``comparison.json`` (schema 1) and hold no state. *Equal examples* is the score after the
last round. The two other views give each method the budget that the reference method used in the run of the same seed,
and take the last evaluated round that fits: before training if none does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexp.comparison.statistics import mean

Run = Mapping[str, Any]
Axis = Literal["examples", "bytes", "time"]
BEFORE = 0
"""The round that stands for the pretrained model, before training."""


@dataclass(frozen=True)
class Reached:
    """What a run had reached: the mean personal score over clients, after which round."""

    round: int
    score: float | None


def runs(comparison: Mapping[str, Any], name: str) -> dict[int, Run]:
    """The runs of the method ``name`` by seed."""
    for method in comparison["methods"]:
        if method["name"] == name:
            return {int(run["seed"]): run for run in method["runs"]}
    return {}


def side_scores(run: Run, side: str, round: int | None = None) -> list[float | None]:
    """Every client's score on ``side`` (``"personal"`` or ``"global"``) after ``round`` (default: the last).

    Also ``"personal_loss"`` and ``"global_loss"``, which are not known before training.
    """
    if round is None:
        round = last_round(run)
    for entry in run["rounds"]:
        if int(entry["round"]) == round:
            return list((entry.get(side) or {}).values())
    return list((run["before"].get(side) or {}).values()) if round == BEFORE else []


def last_round(run: Run) -> int:
    """The last evaluated round; :data:`BEFORE` when there is none."""
    return int(run["rounds"][-1]["round"]) if run["rounds"] else BEFORE


def has_clock(comparison: Mapping[str, Any]) -> bool:
    """Whether any run has a virtual clock; then it is the measure of time, else the clients' measured seconds."""
    return any(
        entry.get("virtual_seconds") is not None
        for method in comparison["methods"]
        for run in method["runs"]
        for entry in run["rounds"]
    )


def spent(entry: Mapping[str, Any], axis: Axis, clock: bool) -> float | None:
    """What training had cost at the end of a round: bytes (up and down), seconds, or rounds.

    Bytes and measured seconds are means over the clients that take part. What trains where no client does anything
    (``centralized``) has no cost that these axes know.
    """
    if axis == "examples":
        return float(entry["round"])
    keys = ("bytes_up", "bytes_down") if axis == "bytes" else ("virtual_seconds" if clock else "client_seconds",)
    known = [entry.get(key) for key in keys]
    if not any(entry.get(key) for key in ("bytes_up", "bytes_down", "client_seconds")):
        return None if entry.get("steps") else 0.0  # a method that does nothing is on no clock
    return None if any(value is None for value in known) else float(sum(value for value in known if value is not None))


def budgets(comparison: Mapping[str, Any], axis: Axis) -> dict[int, float]:
    """By seed, what the reference spent in all; seeds for which that is not known are left out."""
    clock = has_clock(comparison)
    found = {}
    for seed, run in runs(comparison, str(comparison["reference"])).items():
        total = spent(run["rounds"][-1], axis, clock) if run["rounds"] else None
        if total is not None:
            found[seed] = total
    return found


def reached(run: Run, axis: Axis, budget: float, clock: bool) -> Reached | None:
    """Where ``run`` stood when it had spent ``budget``; ``None`` when its spending is not known."""
    best = BEFORE
    for entry in run["rounds"]:
        cost = spent(entry, axis, clock)
        if cost is None:
            return None
        if cost <= budget * (1 + 1e-9):  # sums of floats differ in their last digits
            best = max(best, int(entry["round"]))
    return Reached(best, mean(side_scores(run, "personal", best)))


def view(comparison: Mapping[str, Any], name: str, axis: Axis, limit: float | None = None) -> dict[int, Reached]:
    """By seed, where the method ``name`` stood at ``limit`` (bytes or seconds; default: what the reference spent)."""
    if axis == "examples":
        return {
            seed: Reached(last_round(run), mean(side_scores(run, "personal")))
            for seed, run in runs(comparison, name).items()
        }
    clock, mine = has_clock(comparison), runs(comparison, name)
    limits = budgets(comparison, axis) if limit is None else dict.fromkeys(mine, limit)
    found = {seed: reached(run, axis, limits[seed], clock) for seed, run in mine.items() if seed in limits}
    return {seed: place for seed, place in found.items() if place is not None}
