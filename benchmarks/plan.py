"""Optimised plans beside cuts by memory alone and one cut for everybody, in predicted cost and on the virtual clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.tools.command import Model, Result
from benchmarks.tools.other_plans import memory_only, static, virtual_time
from flexp.errors import ConfigError
from flexp.planner.accuracy import AccuracyCurve
from flexp.planner.fleet import Fleet, Weights
from flexp.planner.model import ModelCosts
from flexp.planner.plan import Costs, Plan, counts, make_plan
from flexp.planner.problem import Problem
from flexp.planner.solve import Solution, solve
from flexp.report import formats
from flexp.run.planned import load_fleet

COLUMNS = ("fleet", "plan", "cuts", "objective", "loss", "virtual time", "÷ optimised", "÷ equal accuracy")
QUICKEST = Weights(round=1.0, time=0.01, energy=0.0, bytes=0.0, accuracy=0.0)


def measure(
    fleets: Annotated[
        list[Path] | None, typer.Argument(help="fleet.toml files; default: those in experiments/fleets.")
    ] = None,
    model: Model = "asset:minilm-l6",
    curve: Annotated[
        Path | None, typer.Option(metavar="CURVE.json", help="An accuracy curve; default: the prior.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every client on the virtual clock.")] = 20,
) -> Result:
    """Optimised plans beside the deepest cuts that fit, and beside one cut for everybody."""
    expected = None if curve is None else AccuracyCurve.read(curve)
    found = []
    for path in fleets or sorted(Path("experiments/fleets").glob("*.toml")):
        fleet = load_fleet(path)
        found.append(compare(fleet, ModelCosts(model, fleet.task, fleet.choices, fleet.server), expected, steps))
    if not found:
        raise ConfigError("no fleet to plan for: name fleet.toml files, such as experiments/fleets/*.toml")
    slowest = max(row["plan_seconds"] for row in found)
    note = f"Losses are expected points of accuracy ({found[0]['accuracy']}); planned in at most {slowest:.1f} s."
    rows = [cells for row in found for cells in _cells(row)]
    facts = {"model": model, "steps": steps, "rows": found}
    return Result(facts, rows, COLUMNS, [f"{model}, {steps} steps of every client", note])


def _cells(row: dict[str, Any]) -> Iterator[list[str]]:
    best = row["ways"]["optimised"]
    for name, way in row["ways"].items():
        first, equal = way is best, way.get("equal_accuracy")
        cuts = [formats.cut(cut) for cut in way["cuts"]]
        yield [
            f"{row['fleet']} ({row['clients']})" if first else "", name,
            cuts[0] if len(cuts) == 1 else f"{cuts[0]} … {cuts[-1]}", f"{way['objective']:.3f}",
            f"{100 * way['loss']:.1f}", formats.seconds(way["virtual_seconds"]),
            "" if first else f"{way['virtual_seconds'] / best['virtual_seconds']:.2f}",
            "" if equal is None else f"{way['virtual_seconds'] / equal['virtual_seconds']:.2f}",
        ]  # fmt: skip


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
