"""The one set of modules that all clients of a simulation train and are scored with, and a client's loop on it.

Clients that hold the whole model differ by their trained weights alone. These are kept as plain tensors and loaded
when it is a client's turn, so that eight clients cost one set of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flexp.client.exchange import Piece
from flexp.client.personal import WholeModel
from flexp.client.trainer import BatchOrder, Step, Trainer
from flexp.config import OptimizerConfig, TrainConfig
from flexp.data.types import ClientData, Task
from flexp.models.stage import Stage
from flexp.optim import Updater

Weights = dict[str, Tensor]
"""Trained parameters by their names in the model."""


class Harness(WholeModel):
    """A whole model whose trained weights are put in and taken out.

    Attributes:
        holds: whose weights it holds for scoring; ``None`` after anything else was put in.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.parameters = stage.trainable()
        self.holds: str | None = None
        self._before_update: Callable[[], None] | None = None

    def put(self, weights: Mapping[str, Tensor], holds: str | None = None) -> None:
        """Copy ``weights``, which may be some of all, into the modules."""
        self.holds = holds
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value)

    def take(self, names: Collection[str] | None = None) -> Weights:
        """Copies of the weights ``names``; of all without."""
        return {
            name: value.detach().clone() for name, value in self.parameters.items() if names is None or name in names
        }

    def in_head(self, name: str) -> bool:
        """Whether a trained parameter lies outside of the base model: in the head for the task."""
        return not name.startswith(self.stage.model.base_model_prefix + ".")

    @contextmanager
    def before_update(self, act: Callable[[], None]) -> Iterator[None]:
        """Inside the ``with`` block, call ``act`` when a step's gradients are complete and not yet applied."""
        self._before_update = act
        try:
            yield
        finally:
            self._before_update = None

    def pulled(self, anchor: Mapping[str, Tensor], strength: float) -> Callable[[], None]:
        """For :meth:`before_update`: add the gradient of strength/2 · ‖weights − anchor‖²."""

        def add() -> None:
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:  # what the loss does not reach never leaves its anchor
                    parameter.grad.add_(parameter.detach() - anchor[name], alpha=strength)

        return add

    @contextmanager
    def frozen_except(self, names: Collection[str]) -> Iterator[None]:
        """Inside the ``with`` block, compute gradients for ``names`` alone."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)

    @contextmanager
    def part_of_step(self, piece: Piece) -> Iterator[None]:
        yield
        if piece.last and self._before_update is not None:
            self._before_update()


class Worker(Trainer):
    """A client's loop over one of its models: the Trainer's batches, seeds and step, the Harness's modules.

    It counts gradient evaluations (``steps``), which also are its place in the learning rate's schedule, and batches
    (``drawn``), of which there are fewer where a method evaluates several gradients on one.

    Args:
        total: gradient evaluations in the whole run, the end of the schedule.
    """

    def __init__(
        self, data: ClientData, task: Task, harness: Harness, config: TrainConfig, *, seed: int, total: int
    ) -> None:
        self._idle = Updater({}, config.personal)
        super().__init__(data, task, harness, self._idle, config, seed=seed)
        self.harness, self.config, self.total = harness, config, total
        self.drawn = 0
        self.before = 0  # steps that belong to an earlier schedule
        self._noise = self._random.state
        self._seed = seed
        self._chosen = _Chosen(len(data.train), config.batch_size, seed)
        self._order = self._chosen

    def step(self, *, again: bool = False, same_noise: bool = False) -> Step:
        """One gradient evaluation and its update, on the next batch or ``again`` on the last one.

        ``same_noise``: with the last step's random numbers (dropout) as well, so that only the weights differ.
        """
        if not again:
            self.drawn += 1
        if same_noise:
            self._random.state = self._noise
        self._noise = self._random.state
        self._chosen.number = self.drawn - 1
        self.updater.steps = self.steps - self.before
        return super().step()

    @contextmanager
    def optimiser(
        self,
        parameters: Mapping[str, nn.Parameter],
        state: Mapping[str, Tensor] | None = None,
        config: OptimizerConfig | None = None,
    ) -> Iterator[Updater]:
        """A new optimiser for the steps inside the ``with`` block; ``train.personal`` unless ``config`` says otherwise.

        Args:
            state: of those parameters whose optimiser state outlives a round (:func:`optimizer_state`).
        """
        self.updater = Updater(parameters, config or self.config.personal, self.total, self.harness.stage.new)
        if state:
            self.updater.load({"steps": torch.tensor(self.steps), **state})
        try:
            yield self.updater
        finally:
            self.updater = self._idle

    def fork(self, total: int | None = None) -> Worker:
        """A worker that goes on from here without moving this one; ``total``: with a new schedule of so many steps."""
        fork = Worker(self.data, self.task, self.harness, self.config, seed=self._seed, total=total or self.total)
        fork.load(self.state())
        fork.before, fork.seconds = 0 if total is None else fork.steps, 0.0
        return fork

    def state(self) -> dict[str, Tensor]:
        return {
            "steps": torch.tensor(self.steps),
            "drawn": torch.tensor(self.drawn),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "random": self._random.state.clone(),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.steps, self.drawn = int(state["steps"]), int(state["drawn"])
        self.seconds = float(state["seconds"])
        self._random.state = state["random"].clone()


class _Chosen(BatchOrder):
    """The same order, but the batch is chosen, not counted."""

    number = 0

    def indices(self, step: int) -> list[int]:
        return super().indices(self.number)


def optimizer_state(updater: Updater, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of what an optimiser remembers of the parameters ``names``."""
    return {entry: value.clone() for entry, value in updater.state().items() if "/" in entry and _owner(entry) in names}


def _owner(entry: str) -> str:
    return entry.partition("/")[2]


def size(weights: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors as they are."""
    return sum(value.numel() * value.element_size() for value in weights.values())
