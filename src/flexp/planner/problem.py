"""Score: what a plan for groups of equal devices comes to, and whether it keeps what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexp.planner.fleet import Weights
from flexp.planner.options import Option


@dataclass(frozen=True)
class Group:
    """Clients whose devices are equal; every one may take another of the ``options``, all of which fit the device."""

    clients: tuple[str, ...]
    options: tuple[Option, ...]
    deadline_s: float | None = None


@dataclass(frozen=True)
class Measures:
    """What a plan comes to.

    Attributes:
        round_seconds: until everybody has made a step: the slowest client, or the server's work for all of them.
        step_seconds, energy_joules, bytes, loss: of a client's step, means over clients.
        server_seconds: the server's work for one step of everybody, all its slots together.
        server_memory_bytes: shared blocks and everybody's exchange in flight.
        objective: the weighted sum.
    """

    round_seconds: float
    step_seconds: float
    energy_joules: float
    bytes: float
    loss: float
    server_seconds: float
    server_memory_bytes: int
    objective: float

    def named(self) -> dict[str, float]:
        """The figures that the weights are about, by the weights' names."""
        return {
            "round": self.round_seconds,
            "time": self.step_seconds,
            "energy": self.energy_joules,
            "bytes": self.bytes,
            "accuracy": self.loss,
        }


Counts = Sequence[Mapping[int, int]]
"""For each group: option's index → how many clients take it."""


@dataclass(frozen=True)
class Problem:
    """What is to be solved.

    Attributes:
        server_memory: bytes; ``block_bytes``: of each of the model's blocks when it is shared, with gradient and
            optimiser state. The server holds every block from the smallest s to the largest e.
        slots: of the server.
        scales: what the figures of :meth:`Measures.named` are divided by before they are weighed.
        limits: the most that some of these figures may be, for Pareto fronts.
    """

    groups: tuple[Group, ...]
    server_memory: int
    block_bytes: tuple[int, ...]
    weights: Weights
    scales: Mapping[str, float]
    slots: int = 1
    limits: Mapping[str, float] | None = None

    @property
    def clients(self) -> int:
        return sum(len(group.clients) for group in self.groups)

    @property
    def memory_may_run_short(self) -> bool:
        """Whether some assignment needs more than the server's memory."""
        most = sum(
            len(group.clients) * max(option.prediction.server_memory_bytes for option in group.options)
            for group in self.groups
        )
        return most + sum(self.block_bytes) > self.server_memory

    def coefficients(self) -> dict[str, float]:
        """What one unit of each figure adds to the objective."""
        return {name: weight / self.scales[name] for name, weight in self.weights.model_dump().items()}

    def measure(self, counts: Counts) -> Measures:
        """What the plan in which ``counts`` clients take each option comes to."""
        taken = [
            (group.options[index], number)
            for group, own in zip(self.groups, counts, strict=True)
            for index, number in own.items()
            if number
        ]
        mean = _means(taken)
        server = sum(number * option.prediction.server_seconds for option, number in taken)
        start = min(option.choice.cut[0] for option, _ in taken)
        stop = max(option.choice.cut[1] for option, _ in taken)
        found = Measures(
            round_seconds=max(server / self.slots, *(option.prediction.step_seconds for option, _ in taken)),
            step_seconds=mean["time"],
            energy_joules=mean["energy"],
            bytes=mean["bytes"],
            loss=mean["accuracy"],
            server_seconds=server,
            server_memory_bytes=sum(self.block_bytes[start:stop])
            + sum(number * option.prediction.server_memory_bytes for option, number in taken),
            objective=0.0,
        )
        price = self.coefficients()
        return replace(found, objective=sum(price[name] * value for name, value in found.named().items()))

    def allows(self, counts: Counts, slack: float = 1e-9) -> bool:
        """Whether the plan keeps what clients share: the server's memory, and its time within everybody's deadline."""
        found = self.measure(counts)
        deadlines = [group.deadline_s for group in self.groups if group.deadline_s is not None]
        within = all(
            found.named()[name] <= limit * (1 + slack) + slack * 1e-3 for name, limit in (self.limits or {}).items()
        )
        return (
            within
            and found.server_memory_bytes <= self.server_memory
            and found.server_seconds / self.slots <= min(deadlines, default=float("inf")) * (1 + slack)
        )


def scales(groups: Sequence[Group]) -> dict[str, float]:
    """The figures of a plan in which everybody takes its fastest option (1 for what is 0 there), and a percentage point
    of accuracy."""
    fastest = [
        (min(group.options, key=lambda option: (option.prediction.step_seconds, option.costs())), len(group.clients))
        for group in groups
    ]
    found = {"round": max(option.prediction.step_seconds for option, _ in fastest), **_means(fastest)}
    return {name: value or 1.0 for name, value in found.items()} | {"accuracy": 0.01}


def _means(taken: Sequence[tuple[Option, int]]) -> dict[str, float]:
    """The figures of a client's step, means over clients."""
    total = sum(number for _, number in taken)
    figures = [(option.figures, number) for option, number in taken]
    return {name: sum(number * own[name] for own, number in figures) / total for name in figures[0][0]}
