"""The exact optimum: a mixed-integer program, solved by HiGHS through scipy.

Variables: n[g, c], how many clients of group g take option c; y[g, c], whether any does (n itself where the group is
one client); r, the round's seconds; and for each block whether the server holds it.

    minimise   Σ n[g, c] · cost(g, c) + price · r
    subject to Σ_c n[g, c] = N_g                                   every client takes an option
               r ≥ seconds(g, c) · y[g, c],  r ≥ Σ n · server / slots
               Σ n · server ≤ slots · deadline_g                   nobody's deadline is missed by queueing
               Σ n · in flight + Σ_b bytes(b) · held(b) ≤ the server's memory
               held(b) ≥ below(b) + above(b) − 1                   every block from the smallest s to the largest e

Clients of a group are interchangeable, so that counting them loses nothing: 1,000 devices of six kinds are six groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from flexp.errors import FlexpError
from flexp.planner.options import Option
from flexp.planner.problem import Group, Measures, Problem

SMALL = 64
"""Groups up to which the optimum is proven to the last digit; beyond, to :data:`GAP` of its value."""
GAP = 1e-4


@dataclass(frozen=True)
class Solution:
    """Each client's option, in the order of the groups, and what they come to together."""

    options: dict[str, Option]
    measures: Measures


def solve(problem: Problem, time_limit: float = 60.0) -> Solution | None:
    """The best plan; ``None`` when there is none that keeps what the clients share.

    Raises:
        FlexpError: the solver gave up, which only its time limit is known to cause.
    """
    program = _Program(problem)
    found = milp(
        program.objective,
        integrality=program.integrality,
        bounds=Bounds(0.0, program.upper),
        constraints=program.constraints(),
        options={"mip_rel_gap": 0.0 if len(problem.groups) <= SMALL else GAP, "time_limit": time_limit},
    )
    if found.status == 2:
        return None
    if found.x is None:
        raise FlexpError(f"the planner's solver found no plan within {time_limit:.0f} s ({found.message})")
    counts = program.counts(found.x)
    return Solution(dict(_assigned(problem, counts)), problem.measure(counts))


def _assigned(problem: Problem, counts: list[dict[int, int]]) -> Iterator[tuple[str, Option]]:
    for group, own in zip(problem.groups, counts, strict=True):
        names = iter(group.clients)
        for index in sorted(own):
            for _ in range(own[index]):
                yield next(names), group.options[index]


class _Program:
    """The rows and columns. Memory is in shares of the server's, seconds in those of the scale: all are near 1."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._integer: list[int] = []
        price, total = problem.coefficients(), problem.clients
        self.number = [
            [
                self._column(
                    upper=len(group.clients),
                    cost=sum(price[name] * value for name, value in option.figures.items()) / total,
                    integer=True,
                )
                for option in group.options
            ]
            for group in problem.groups
        ]
        for columns, group in zip(self.number, problem.groups, strict=True):
            self._row(columns, [1.0] * len(columns), len(group.clients), len(group.clients))
        self._second = 1.0 / problem.scales["round"]
        self._round = self._column(upper=np.inf, cost=price["round"] * problem.scales["round"])
        self._any = [list(columns) if len(g.clients) == 1 else None for columns, g in self._pairs()]
        limits = problem.limits or {}
        if price["round"] or "round" in limits:
            self._time()
        self._server_time()
        if problem.memory_may_run_short:
            self._memory()
        self._limits(limits)
        self.objective, self.integrality = np.array(self._cost), np.array(self._integer)
        self.upper = np.array(self._upper)

    def constraints(self) -> LinearConstraint:
        row = np.repeat(np.arange(len(self._rows)), [len(columns) for columns, *_ in self._rows])
        column = np.concatenate([np.array(columns) for columns, *_ in self._rows])
        value = np.concatenate([np.array(values) for _, values, *_ in self._rows])
        matrix = coo_array((value, (row, column)), shape=(len(self._rows), len(self._cost))).tocsr()
        return LinearConstraint(matrix, [low for *_, low, _ in self._rows], [high for *_, high in self._rows])

    def counts(self, x: np.ndarray) -> list[dict[int, int]]:
        """How many clients of each group take which option."""
        return [
            {index: round(x[column]) for index, column in enumerate(columns) if round(x[column])}
            for columns in self.number
        ]

    def _time(self) -> None:
        for group, (columns, own) in enumerate(self._pairs()):
            seconds = [self._second * option.prediction.step_seconds for option in own.options]
            # Not needed, but it is true of means, and makes the relaxation tight.
            share = [-value / len(own.clients) for value in seconds]
            self._row([self._round, *columns], [1.0, *share], 0.0, np.inf)
            if len(own.clients) > 1:
                for one, value in zip(self._taken(group), seconds, strict=True):
                    self._row([self._round, one], [1.0, -value], 0.0, np.inf)
        columns, values = self._all("server_seconds", -self._second / self.problem.slots)
        self._row([self._round, *columns], [1.0, *values], 0.0, np.inf)

    def _server_time(self) -> None:
        deadlines = [group.deadline_s for group in self.problem.groups if group.deadline_s is not None]
        if deadlines:
            columns, values = self._all("server_seconds", 1.0 / (self.problem.slots * min(deadlines)))
            self._row(columns, values, 0.0, 1.0)

    def _memory(self) -> None:
        unit = 1.0 / self.problem.server_memory
        columns, values = self._all("server_memory_bytes", unit)
        for block, size in enumerate(self.problem.block_bytes):
            below, above, held = (self._column(upper=1.0) for _ in range(3))
            self._row([held, below, above], [1.0, -1.0, -1.0], -1.0, np.inf)
            columns.append(held)
            values.append(unit * size)
            for group, own in enumerate(self.problem.groups):
                for one, option in zip(self._taken(group), own.options, strict=True):
                    if option.choice.cut[0] <= block:
                        self._row([below, one], [1.0, -1.0], 0.0, np.inf)
                    if option.choice.cut[1] > block:
                        self._row([above, one], [1.0, -1.0], 0.0, np.inf)
        self._row(columns, values, 0.0, 1.0)

    def _limits(self, limits: Mapping[str, float]) -> None:
        total = self.problem.clients
        for name, limit in limits.items():
            if name == "round":
                self._row([self._round], [1.0], 0.0, limit * self._second)
                continue
            unit = self.problem.scales[name]
            columns = [column for own in self.number for column in own]
            figures = [
                option.figures[name] / (unit * total) for group in self.problem.groups for option in group.options
            ]
            self._row(columns, figures, -np.inf, limit / unit)

    def _taken(self, group: int) -> list[int]:
        """Columns that say whether anyone of ``group`` takes each option."""
        found = self._any[group]
        if found is None:
            size = len(self.problem.groups[group].clients)
            found = self._any[group] = []
            for column in self.number[group]:
                one = self._column(upper=1.0, integer=True)
                self._row([one, column], [float(size), -1.0], 0.0, np.inf)
                found.append(one)
        return found

    def _all(self, name: str, factor: float) -> tuple[list[int], list[float]]:
        columns = [column for own in self.number for column in own]
        values = [
            factor * getattr(option.prediction, name) for group in self.problem.groups for option in group.options
        ]
        return columns, values

    def _pairs(self) -> Iterator[tuple[list[int], Group]]:
        return zip(self.number, self.problem.groups, strict=True)

    def _column(self, upper: float, cost: float = 0.0, integer: bool = False) -> int:
        self._cost.append(cost)
        self._upper.append(upper)
        self._integer.append(int(integer))
        return len(self._cost) - 1

    def _row(self, columns: list[int], values: list[float], low: float, high: float) -> None:
        self._rows.append((columns, values, low, high))
