"""A comparison by another measure than examples: the score for equal bytes, and for equal time. Pure functions.

* ``examples``: after the last round; every method has computed on as many examples.
* ``bytes``: after the last evaluated round whose traffic (up and down, mean over clients, cumulative) is within the
  budget; before training if none is.
* ``time``: the same with the virtual clock, or where there are no devices with a client's measured seconds.

A budget is what the reference itself spends, mean over its runs, unless one is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from flexp.comparison.statistics import What, of_scores

View = Literal["examples", "bytes", "time"]
VIEWS: tuple[View, ...] = ("examples", "bytes", "time")


def find(comparison: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The method called ``name``."""
    return next((method for method in comparison["methods"] if method["name"] == name), None)


def clock(comparison: Mapping[str, Any]) -> Literal["virtual_seconds", "client_seconds"]:
    """Which time is compared: the virtual one if any round has it."""
    rounds = (at for method in comparison["methods"] for run in method["runs"] for at in run["rounds"])
    return "virtual_seconds" if any(at.get("virtual_seconds") is not None for at in rounds) else "client_seconds"


def spent(at: Mapping[str, Any], view: View, time: str) -> float | None:
    """What was spent until the end of a round, in bytes or seconds; None if it is not known."""
    if view == "bytes":
        return float(at["bytes_up"] + at["bytes_down"])
    value = at.get(time)
    return None if value is None else float(value)


def budget(comparison: Mapping[str, Any], view: View) -> float | None:
    """What the reference spends in all, mean over its runs; None without it, or where it is not known."""
    reference = find(comparison, comparison["reference"])
    if view == "examples" or reference is None:
        return None
    time = clock(comparison)
    totals = [spent(run["rounds"][-1], view, time) for run in reference["runs"] if run["rounds"]]
    known = [total for total in totals if total is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(totals) else None


def chosen(run: Mapping[str, Any], view: View, limit: float | None, time: str) -> Mapping[str, Any] | None:
    """The round (or ``before``) of a run whose scores count in a view; None if that cannot be known."""
    if not run["rounds"]:
        return None
    last: Mapping[str, Any] = run["rounds"][-1]
    if view == "examples":
        return last
    if limit is None:
        return None
    found: Mapping[str, Any] = run["before"]
    for at in run["rounds"]:
        cost = spent(at, view, time)
        if cost is None:
            return None
        if cost > limit * (1 + 1e-9):
            break
        found = at
    return found


def by_seed(
    comparison: Mapping[str, Any],
    method: Mapping[str, Any],
    view: View,
    what: What = "personal",
    limit: float | None = None,
) -> dict[int, float | None]:
    """Seed → ``what`` of a method in a view. ``limit`` is the budget in bytes or seconds; None: the reference's."""
    limit = budget(comparison, view) if limit is None else limit
    time, higher = clock(comparison), bool(comparison["higher_is_better"])
    result: dict[int, float | None] = {}
    for run in method["runs"]:
        at = chosen(run, view, limit, time)
        result[int(run["seed"])] = None if at is None else of_scores(at, what, higher)
    return result
