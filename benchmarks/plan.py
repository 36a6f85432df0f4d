"""Optimised plans beside cuts by memory alone and one cut for everybody, in predicted cost and on the virtual clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flexp.errors import ConfigError
from flexp.machine import machine
from flexp.planner.accuracy import AccuracyCurve
from flexp.planner.baselines import memory_only, static
from flexp.planner.fleet import Fleet, Weights
from flexp.planner.model import ModelCosts
from flexp.planner.plan import Costs, Plan, counts, make_plan
from flexp.planner.problem import Problem
from flexp.planner.solve import Solution, solve
from flexp.planner.virtual import virtual_time
from flexp.run.planned import load_fleet

QUICKEST = Weights(round=1.0, time=0.01, energy=0.0, bytes=0.0, accuracy=0.0)


def bench_plan(
    files: Sequence[Path], model: str, curve: AccuracyCurve | None = None, steps: int = 20
) -> dict[str, Any]:
    """A row for each fleet.

    Raises:
        ConfigError: there is no fleet.
        InfeasibleError: a fleet has no plan.
    """
    if not files:
        raise ConfigError("no fleet to plan for: name fleet.toml files, such as experiments/fleets/*.toml")
    rows = []
    for path in files:
        fleet = load_fleet(path)
        costs = ModelCosts(model, fleet.task, fleet.choices, fleet.server)
        rows.append(compare(fleet, costs, curve, steps))
    return {"bench": "plan", "model": model, "steps": steps, "rows": rows, "machine": machine()}


def compare(fleet: Fleet, costs: Costs, curve: AccuracyCurve | None = None, steps: int = 20) -> dict[str, Any]:
    """One fleet: the plan, both baselines, and the quickest plans that expect no more loss than each baseline."""
    began = time.perf_counter()
    plan = make_plan(fleet, costs, curve)
    seconds = time.perf_counter() - began
    ways = {"optimised": plan.solution, "memory-only": memory_only(plan), "static": static(plan)}
    found: dict[str, Any] = {}
    for name, solution in ways.items():
        if solution is None:
            continue
        found[name] = _facts(plan, solution, steps)
        if name != "optimised":
            equal = _quickest(plan, solution.measures.loss)
            found[name]["equal_accuracy"] = None if equal is None else _facts(plan, equal, steps)
    return {
        "fleet": fleet.name,
        "clients": len(fleet.devices),
        "plan_seconds": seconds,
        "accuracy": plan.curve.source,
        "ways": found,
    }


def _facts(plan: Plan, solution: Solution, steps: int) -> dict[str, Any]:
    clock = virtual_time(plan.fleet, solution.options, steps)
    cuts = sorted({option.choice.cut for option in solution.options.values()})
    finished = [client.finished for client in clock.clients.values()]
    problem = plan.setting.problem
    return {
        **asdict(solution.measures),
        "server_memory_fits": solution.measures.server_memory_bytes <= problem.server_memory,
        "cuts": [list(cut) for cut in cuts],
        "virtual_seconds": max(finished),
        "virtual_mean_seconds": sum(finished) / len(finished),
    }


def _quickest(plan: Plan, loss: float) -> Solution | None:
    """The quickest plan whose expected loss is at most ``loss``, by the round's time alone."""
    best: Solution | None = None
    for setting in plan.settings:
        limited: Problem = replace(setting.problem, weights=QUICKEST, limits={"accuracy": loss + 1e-9})
        found = solve(limited)
        if found is not None:
            measured = replace(found, measures=setting.problem.measure(counts(limited, found)))
            if best is None or measured.measures.round_seconds < best.measures.round_seconds:
                best = measured
    return best
