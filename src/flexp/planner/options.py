"""Enumerate and filter: every choice for a device, those that fit it, and those that no other beats in everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from flexp.cost.choice import Choice, Prediction
from flexp.cost.profile import Profile
from flexp.errors import ConfigError
from flexp.planner.fleet import Choices, Device

Predict = Callable[[Profile, Choice], Prediction]
Loss = Callable[[Choice], float]
"""The personal accuracy that a choice is expected to cost, as a fraction."""


@dataclass(frozen=True)
class Option:
    """A choice with what follows from it; ``loss``: of personal accuracy, as a fraction."""

    choice: Choice
    prediction: Prediction
    loss: float

    @property
    def bytes(self) -> int:
        """Of a step, both ways."""
        return self.prediction.bytes_up + self.prediction.bytes_down

    @property
    def figures(self) -> dict[str, float]:
        """What a client's step comes to, by the names of :class:`flexp.planner.fleet.Weights`; less is better."""
        found = self.prediction
        return {
            "time": found.step_seconds,
            "energy": found.energy_joules,
            "bytes": float(self.bytes),
            "accuracy": self.loss,
        }

    def costs(self, server_memory: bool = True) -> tuple[float, ...]:
        """Everything that a plan adds up or bounds, the server's blocks aside; less is better."""
        most = (*self.figures.values(), self.prediction.server_seconds)
        return (*most, float(self.prediction.server_memory_bytes)) if server_memory else most


def grid(choices: Choices, blocks: int, batch_size: int, rank: int | None) -> list[Choice]:
    """Every choice that a model of ``blocks`` blocks admits, with ``rank`` for all.

    Raises:
        ConfigError: there is none.
    """
    starts = range(1, blocks) if choices.starts is None else sorted(set(choices.starts))
    cuts = [(start, blocks - tail) for start in starts for tail in sorted(set(choices.tails)) if start < blocks - tail]
    wanted = range(1, batch_size + 1) if choices.micro_batches is None else sorted(set(choices.micro_batches))
    micro = [size for size in wanted if batch_size % size == 0]
    found = [
        Choice(cut, size, batch_size // size, checkpointing, rank, codec)
        for cut, size, checkpointing, codec in product(
            cuts, micro, sorted(set(choices.checkpointing)), list(dict.fromkeys(choices.codecs))
        )
    ]
    if not found:
        raise ConfigError(
            f"nothing can be chosen for a model of {blocks} blocks and steps of {batch_size} examples: expected "
            "choices.starts and choices.tails that leave the server a block, and choices.micro_batches that divide "
            "task.batch_size"
        )
    return found


def options_of(device: Device, choices: Iterable[Choice], predict: Predict, loss: Loss) -> list[Option]:
    """Every choice with its prediction on ``device``, whether it fits or not."""
    return [Option(choice, predict(device.profile, choice), loss(choice)) for choice in choices]


def fits(option: Option, device: Device) -> bool:
    """Whether ``option`` keeps the device's memory and its deadline."""
    return fits_memory(option, device) and in_time(option, device)


def fits_memory(option: Option, device: Device) -> bool:
    """Whether the peak is within the device's memory, and a GPU's client within its machine's, with its margin."""
    prediction = option.prediction
    return prediction.memory_bytes <= device.usable_bytes and prediction.host_bytes <= device.usable_host_bytes


def in_time(option: Option, device: Device) -> bool:
    """Whether a step is within the device's deadline."""
    return device.deadline_s is None or option.prediction.step_seconds <= device.deadline_s


def prune(options: Sequence[Option], server_memory: bool = True) -> list[Option]:
    """``options`` without those that another one equals or beats in every cost; of equals the first stays.

    No optimum of a plan gets worse by it: the other one could take its place. With ``server_memory``, which may then
    run short, the other one must also need no more of it, and no block of the server that this one does not.
    """
    kept: list[Option] = []
    costs = {id(option): option.costs(server_memory) for option in options}
    # Who beats another one comes first in this order, so that only what is kept already can beat what comes.
    for option in sorted(options, key=lambda option: (costs[id(option)], _span(option) if server_memory else 0)):
        own = costs[id(option)]
        if not any(
            all(a <= b for a, b in zip(costs[id(other)], own, strict=True))
            and (not server_memory or _within(other, option))
            for other in kept
        ):
            kept.append(option)
    return sorted(kept, key=lambda option: (option.choice.cut, costs[id(option)]))


def _within(inner: Option, outer: Option) -> bool:
    """Whether ``inner`` needs no block of the server that ``outer`` does not."""
    return inner.choice.cut[0] >= outer.choice.cut[0] and inner.choice.cut[1] <= outer.choice.cut[1]


def _span(option: Option) -> int:
    return option.choice.cut[1] - option.choice.cut[0]
