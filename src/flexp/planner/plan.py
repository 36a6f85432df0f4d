"""From a fleet to a plan: every client's choice, and what it comes to.

:mod:`flexp.planner.options` enumerates and filters, :mod:`flexp.planner.problem` scores, and :mod:`flexp.planner.solve`
finds the best score exactly (a mixed-integer program, which can be left unread).
"""

from __future__ import annotations

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
    """Choose for every client: enumerate, filter, score.

    Every choice is predicted for every kind of device; those that do not fit it are left out, and those that another
    one beats in everything; of all ways to give clients what is left, that with the least objective is taken.

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
    others = tuple(setting for setting, _ in possible)
    return Plan(fleet, costs.name, costs.fingerprint, costs.blocks, curve, setting, others, solution)


def settings(fleet: Fleet, costs: Costs, curve: AccuracyCurve, *, pruned: bool = True) -> list[Setting]:
    """The problems to solve, one for each rank with which every device has an option.

    Raises:
        InfeasibleError: there is none.
    """
    found: list[Setting] = []
    lacking: list[list[Lack]] = []
    for rank in fleet.ranks:
        kinds = _enumerate(fleet, costs, curve, rank)
        groups = tuple(_filter(kind) for kind in kinds)
        lacks = [
            device_lacks(kind.devices, kind.options, fleet.task, costs.memory, RUN if fleet.of_run else FLEET)
            for kind, group in zip(kinds, groups, strict=True)
            if not group.options
        ]
        if lacks:
            lacking.append(lacks)
            continue
        unit = found[0].problem.scales if found else scales(groups)
        memory = int(fleet.server.memory_bytes / (1.0 + fleet.margin))
        problem = Problem(groups, memory, costs.block_bytes(rank), fleet.weights, unit, fleet.slots)
        found.append(Setting(rank, kinds, _pruned(problem) if pruned else problem))
    if not found:
        lacks = min(lacking, key=len)
        lines = "; ".join(lack.words() for lack in lacks)
        raise InfeasibleError(lacks, f"{fleet.name} cannot train {costs.name}: {lines}")
    return found


def _enumerate(fleet: Fleet, costs: Costs, curve: AccuracyCurve, rank: int | None) -> tuple[Kind, ...]:
    """Every kind of device with every choice."""
    alike: dict[object, list[Device]] = {}
    for device in fleet.devices:
        alike.setdefault(device.kind, []).append(device)
    choices = grid(fleet.choices, costs.blocks, fleet.task.batch_size, rank)
    losses = {choice: curve.loss(choice, costs.blocks, costs.followed) for choice in choices}
    return tuple(
        Kind(tuple(devices), tuple(options_of(devices[0], choices, costs.predict, losses.__getitem__)))
        for devices in alike.values()
    )


def _filter(kind: Kind) -> Group:
    """The kind with the options that fit it."""
    device = kind.devices[0]
    return Group(kind.names, tuple(option for option in kind.options if fits(option, device)), device.deadline_s)


def _pruned(problem: Problem) -> Problem:
    tight = problem.memory_may_run_short
    groups = (replace(group, options=tuple(prune(group.options, tight))) for group in problem.groups)
    return replace(problem, groups=tuple(groups))
