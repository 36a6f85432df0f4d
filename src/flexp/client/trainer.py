"""A client's training loop. One step can be read from top to bottom in :meth:`Trainer.step`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.model import SplitModel
from flexp.client.overlap import Done, overlapped
from flexp.client.personal import answering
from flexp.config import TrainConfig
from flexp.data.types import Batch, ClientData, Task
from flexp.errors import DataError, TrainingError
from flexp.kinds import KINDS, unmasked_tokens
from flexp.links.coding import load_residuals, save_residuals
from flexp.optim import Updater
from flexp.rng import RandomStream, derived_seed, generator

OWED, SENT = "residuals/", "sent/"


class Trainable(Protocol):
    """A model as the loop sees it: split (:class:`flexp.client.model.SplitModel`) or whole."""

    last_align: float | None

    @property
    def device(self) -> torch.device: ...

    def __call__(self, **batch: Any) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def part_of_step(self, piece: Piece) -> AbstractContextManager[None]: ...
    def after_step(self) -> None: ...
    def personal_state(self) -> dict[str, Tensor]: ...
    def load_personal_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Step:
    """What one step of a client was: losses are means over the step's items, ``align`` is without λ."""

    client: str
    number: int
    loss: float
    align: float | None
    items: int
    lr: float
    norm: float
    seconds: float


class Trainer:
    """Trains one client's personal parameters on its private data.

    Args:
        updater: over the personal parameters.
        seed: of the order of the examples and of dropout.

    Attributes:
        micro_batch: examples of one exchange; may be changed between two steps.

    Raises:
        DataError: the client has no training examples.
    """

    def __init__(
        self,
        data: ClientData,
        task: Task,
        model: Trainable,
        updater: Updater,
        config: TrainConfig,
        *,
        seed: int,
    ) -> None:
        if not data.train:
            raise DataError(f"client {data.name} has no training examples; lower data.test_fraction or drop the client")
        self.name = data.name
        self.data, self.task, self.model, self.updater = data, task, model, updater
        self.steps = 0
        self.seconds = 0.0
        wanted = config.class_weights
        self._weights_C = None if wanted is None else task.class_weights(wanted, data.train)
        self._in_flight = config.in_flight
        self.micro_batch = config.micro_batch or -(-config.batch_size // config.in_flight)
        self._order = BatchOrder(len(data.train), config.batch_size, seed)
        self._random = RandomStream(derived_seed(seed, "client"), model.device)

    def step(self) -> Step:
        """One optimiser step on the next batch.

        Raises:
            TrainingError: the loss or a gradient is not finite.
        """
        began = time.perf_counter()
        lr, loss, align = self.updater.lr, 0.0, 0.0
        self.model.train(True)
        self.updater.forget()  # what a failed step may have left

        with self._random.undone_on_failure(), self._random.active():
            pieces = self.pieces()
            for done in self._exchanges(pieces):  # forward and backward, here and on the server
                loss += done.loss * done.piece.share
                align += (done.align or 0.0) * done.piece.tokens
            norm = self._apply()
        self.steps += 1
        self.model.after_step()  # alignment in weight space, if asked for

        items = int(sum(piece.weight for piece, _ in pieces))
        seconds = time.perf_counter() - began
        self.seconds += seconds
        aligned = align if self.model.last_align is not None else None
        return Step(self.name, self.steps, loss, aligned, items, lr, norm, seconds)

    def personal(self, batch: Mapping[str, Tensor]) -> Any:
        """The personal model on a batch, for evaluation; gives an output with ``logits``."""
        return answering(self.model)(batch)

    def _exchanges(self, pieces: list[tuple[Piece, Batch]]) -> Iterator[Done]:
        if self._in_flight > 1 and isinstance(self.model, SplitModel) and not self.model.whole:
            yield from overlapped(self.model, pieces, self._in_flight, self._check, self._loss_of)
            return
        for piece, batch in pieces:
            with self.model.part_of_step(piece):
                output = self.model(**batch)  # head → server → tail → loss
                loss = self._loss_of(output, batch)
                self._check(loss)
                torch.autograd.backward(loss * piece.share)  # tail ← server ← head; the server trains its blocks
            yield Done(piece, loss.item(), self.model.last_align)

    def state(self) -> dict[str, Tensor]:
        """Everything that :meth:`load` needs to go on bit for bit, as flat named tensors."""
        flat = {f"personal/{name}": value for name, value in self.model.personal_state().items()}
        flat |= {f"optimizer/{name}": value for name, value in self.updater.state().items()}
        flat["random"] = self._random.state
        flat["micro_batch"] = torch.tensor(self.micro_batch)
        flat["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        return flat | {"steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.model.load_personal_state(part("personal/"))
        self.updater.load(part("optimizer/"))
        self._random.state = state["random"]
        self.micro_batch = int(state.get("micro_batch", self.micro_batch))
        self.steps, self.seconds = int(state["steps"]), float(state["seconds"])

    def pieces(self) -> list[tuple[Piece, Batch]]:
        """The next step's exchanges, and what each counts; those without any item of the loss are left out."""
        indices, size = self._order.indices(self.steps), self.micro_batch
        weights_C, kind = self._weights_C, KINDS[self.task.model_kind]
        counted: list[tuple[Batch, tuple[int, ...], float, float, int]] = []
        for start in range(0, len(indices), size):
            group = tuple(indices[start : start + size])
            batch = self.task.collate([self.data.train[index] for index in group])
            items = kind.items(batch)
            if items:
                mass = items if weights_C is None else kind.mass(batch, weights_C)
                counted.append((batch, group, items, mass, unmasked_tokens(batch)))
        if not counted:
            raise DataError(
                f"client {self.name}, step {self.steps + 1}: no token of the batch has a loss; "
                "raise data.max_length, so that answers are not cut off"
            )
        of = len(counted)
        _, _, _, masses, tokens = zip(*counted, strict=True)
        return [
            (Piece(number, of, mass / sum(masses), part / sum(tokens), items, examples=group), batch)
            for number, (batch, group, items, mass, part) in enumerate(counted, start=1)
        ]

    def _loss_of(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        """The model's own loss, or with ``train.class_weights`` that of its logits."""
        loss: Tensor = output.loss
        if self._weights_C is not None:
            loss = KINDS[self.task.model_kind].weighted(output.logits, batch["labels"], self._weights_C)
        return loss

    def _apply(self) -> float:
        """Step the personal parameters; gives their gradient's norm."""
        try:
            return self.updater.step()
        except TrainingError as error:  # an optimiser does not know whose it is
            raise TrainingError(f"client {self.name}, {error}") from error

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"client {self.name}, step {self.steps + 1}: the loss is {loss.item()}; lower train.personal.lr "
                f"(now {self.updater.config.lr:g}) or train.shared.lr, set their clip, or use model.dtype = 'float32'"
            )


class BatchOrder:
    """Every epoch is a fresh permutation of the examples; a resumed run asks for any step and gets the same batch.

    An epoch has ``ceil(n_examples / batch_size)`` steps; its last batch may be smaller.

    Raises:
        ValueError: ``n_examples`` or ``batch_size`` is not positive.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        if n_examples < 1 or batch_size < 1:
            raise ValueError(f"n_examples = {n_examples} and batch_size = {batch_size} must be positive")
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.arange(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is used exactly once."""
        return -(-self.n_examples // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The examples of ``step`` (0, 1, 2, ...), at most ``batch_size`` of them and never one twice."""
        if step < 0:
            raise ValueError(f"step = {step} must not be negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # remembered for speed only
            self._epoch = epoch
            self._order = generator(self.seed, "order", epoch).permutation(self.n_examples)
        start = position * self.batch_size
        return [int(index) for index in self._order[start : start + self.batch_size]]


def party_state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that :func:`load_party` needs to go on bit for bit."""
    model = split_model_of(trainer)
    own = {"cut": torch.tensor(model.cut)} | {f"{SENT}{number}": value for number, value in model.sent.items()}
    if model.guard is not None:
        own |= model.guard.state()
    return trainer.state() | own | model.link.meter.tensors() | save_residuals(model.link.residuals, OWED)


def cut_in(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The cut that a client had when its state was taken; ``None``: an older version of FlexP took it."""
    if "cut" not in state:
        return None
    start, stop = map(int, state["cut"])
    return start, stop


def load_party(trainer: Trainer, state: Mapping[str, Tensor]) -> None:
    """Go on from :func:`party_state`.

    Raises:
        ModelError: the state is of another cut or another tuning.
    """
    model = split_model_of(trainer)
    trainer.load(state)
    model.go_on(trainer.steps)
    sent = {key.removeprefix(SENT): value for key, value in state.items() if key.startswith(SENT)}
    same = cut_in(state) == model.cut
    model.sent = {int(key): value.to(model.device, copy=True) for key, value in sent.items() if same}
    model.known = set()  # what the server keeps may be of a later time
    if model.guard is not None:
        model.guard.load(state)
    model.link.meter.load_tensors(state)
    owed = {key.removeprefix(OWED): value for key, value in state.items() if key.startswith(OWED)}
    load_residuals(model.link.residuals, owed)


def split_model_of(trainer: Trainer) -> SplitModel:
    """The model of a client that has a server."""
    assert isinstance(trainer.model, SplitModel)
    return trainer.model
