"""From a fleet to a plan: every client's choice, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flexp.cost.choice import Choice, Prediction
from flexp.cost.profile import Profile
from flexp.planner.accuracy import AccuracyCurve, prior
from flexp.planner.fleet import Device, Fleet, TaskShape
from flexp.planner.infeasible import FLEET, RUN, InfeasibleError, Lack, device_lacks, server_lacks
from flexp.planner.options import Option, fits, grid, options_of, prune
from flexp.planner.problem import Counts, Group, Measures, Problem, scales
from flexp.planner.solve import Solution, solve


class Costs(Protocol):
    """What planning asks of a model. :class:`flexp.planner.model.ModelCosts` answers for real ones.

    Attributes:
        followed: the first block that clients with a deeper head do not train themselves; ``None``: there is none.
    """

    name: str
    fingerprint: str
    blocks: int
    followed: int | None

    def predict(self, profile: Profile, choice: Choice) -> Prediction:
        """One step of a client on ``profile``."""

    def block_bytes(self, rank: int | None) -> tuple[int, ...]:
        """Of each block on the server, with gradient and optimiser state."""

    def memory(self, task: TaskShape, choice: Choice) -> int:
        """The client's peak when the task is another one."""


@dataclass(frozen=True)
class Kind:
    """Equal devices with all their options, those that do not fit included."""

    devices: tuple[Device, ...]
    options: tuple[Option, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(device.name for device in self.devices)


@dataclass(frozen=True)
class Setting:
    """The problem with one rank for everybody; a group for each kind, in the same order."""

    rank: int | None
    kinds: tuple[Kind, ...]
    problem: Problem


@dataclass(frozen=True)
class Plan:
    """What was chosen. ``settings`` are all ranks' problems that have a plan, ``setting`` the chosen one's."""

    fleet: Fleet
    model: str
    fingerprint: str
    blocks: int
    curve: AccuracyCurve
    setting: Setting
    settings: tuple[Setting, ...]
    solution: Solution

    @property
    def measures(self) -> Measures:
        return self.solution.measures

    def choice(self, client: str) -> Choice:
        return self.solution.options[client].choice

    def counts(self) -> Counts:
        """As :meth:`Problem.measure` takes them."""
        return counts(self.setting.problem, self.solution)


def counts(problem: Problem, solution: Solution) -> list[dict[int, int]]:
    """How many clients of each group take which option."""
    found: list[dict[int, int]] = []
    for group in problem.groups:
        places = {id(option): index for index, option in enumerate(group.options)}
        own: dict[int, int] = {}
        for client in group.clients:
            index = places[id(solution.options[client])]
            own[index] = own.get(index, 0) + 1
        found.append(own)
    return found


def make_plan(fleet: Fleet, costs: Costs, curve: AccuracyCurve | None = None, *, pruned: bool = True) -> Plan:
    """Solve for every client's choice.

    Args:
        curve: what a cut costs in accuracy; ``None``: the prior.
        pruned: whether choices that another one beats are left out first, which changes no optimum.

    Raises:
        InfeasibleError: a device or the server lacks something; it says what, and what would help.
    """
    curve = curve or prior()
    found = settings(fleet, costs, curve, pruned=pruned)
    solved = [(setting, solve(setting.problem)) for setting in found]
    possible = [(setting, solution) for setting, solution in solved if solution is not None]
    if not possible:
        raise server_lacks(found[0].problem, fleet.name)
    setting, solution = min(possible, key=lambda item: item[1].measures.objective)
    return Plan(
        fleet,
        costs.name,
        costs.fingerprint,
        costs.blocks,
        curve,
        setting,
        tuple(setting for setting, _ in possible),
        solution,
    )


def settings(fleet: Fleet, costs: Costs, curve: AccuracyCurve, *, pruned: bool = True) -> list[Setting]:
    """The problems to solve, one for each rank with which every device has an option.

    Raises:
        InfeasibleError: there is none.
    """
    task = fleet.task
    ranks: Sequence[int | None] = fleet.choices.ranks or [task.rank if task.tuning == "lora" else None]
    found: list[Setting] = []
    lacking: list[list[Lack]] = []
    unit: dict[str, float] | None = None
    for rank in ranks:
        kinds = _kinds(fleet, grid(fleet.choices, costs.blocks, task.batch_size, rank), costs, curve)
        fitting = [tuple(option for option in kind.options if fits(option, kind.devices[0])) for kind in kinds]
        lacks = [
            device_lacks(kind.devices, kind.options, task, costs.memory, RUN if fleet.of_run else FLEET)
            for kind, options in zip(kinds, fitting, strict=True)
            if not options
        ]
        if lacks:
            lacking.append(lacks)
            continue
        groups = tuple(
            Group(kind.names, options, kind.devices[0].deadline_s) for kind, options in zip(kinds, fitting, strict=True)
        )
        unit = unit or scales(groups)
        problem = Problem(
            groups,
            int(fleet.server.memory_bytes / (1.0 + fleet.margin)),
            costs.block_bytes(rank),
            fleet.weights,
            unit,
            fleet.slots,
        )
        if pruned:
            tight = problem.memory_may_run_short
            groups = tuple(replace(group, options=tuple(prune(group.options, tight))) for group in groups)
            problem = replace(problem, groups=groups)
        found.append(Setting(rank, kinds, problem))
    if not found:
        lacks = min(lacking, key=len)
        lines = "; ".join(lack.words() for lack in lacks)
        raise InfeasibleError(lacks, f"{fleet.name} cannot train {costs.name}: {lines}")
    return found


def _kinds(fleet: Fleet, choices: list[Choice], costs: Costs, curve: AccuracyCurve) -> tuple[Kind, ...]:
    alike: dict[object, list[Device]] = {}
    for device in fleet.devices:
        alike.setdefault(device.kind, []).append(device)
    losses = {choice: curve.loss(choice, costs.blocks, costs.followed) for choice in choices}
    return tuple(
        Kind(tuple(devices), tuple(options_of(devices[0], choices, costs.predict, losses.__getitem__)))
        for devices in alike.values()
    )
