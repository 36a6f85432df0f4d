"""Which exchanges make up a client's step, and what each of them counts in it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from flexp.errors import ConfigError


@dataclass(frozen=True)
class Piece:
    """One exchange's piece of a step, as the training loop sees it.

    Attributes:
        number: from 1, of ``of`` pieces.
        share: of the step's loss items: what the piece's loss is multiplied with, since a step's loss is a mean.
        tokens: its share of the step's unmasked tokens, which alignment is a mean over.
        weight: its loss items.
    """

    number: int = 1
    of: int = 1
    share: float = 1.0
    tokens: float = 1.0
    weight: float = 1.0

    @property
    def last(self) -> bool:
        return self.number == self.of


@dataclass(frozen=True)
class Place:
    """The same as the server is told: see :class:`flexp.links.messages.BackwardRequest`.

    ``number`` is the exchange's in its step, from 1.
    """

    step: int
    number: int
    exchanges: int
    tokens: float
    weight: float

    @property
    def exchange(self) -> int:
        """The exchange's own number: the same whenever it is sent."""
        return self.step << 16 | self.number


class Answerable(Protocol):
    """An exchange; ``answered`` says whether its backward is through."""

    answered: bool


class Steps:
    """Counts a split model's steps and the exchanges in them.

    Args:
        accumulation: exchanges in a step, for loops that do not say so themselves.

    Attributes:
        numbering: tells these steps from those of another run of the same client; goes on with them.
        done: complete steps.
        piece: what the loop said of the exchange that comes next.
    """

    def __init__(self, accumulation: int = 1) -> None:
        self.accumulation = accumulation
        self.numbering = secrets.randbits(62) + 1
        self.done = 0
        self.piece: Piece | None = None
        self._number = 0  # of the step, on the link: the same again when a step is tried again
        self._begun = 0  # exchanges of an unfinished step
        self._previous: Answerable | None = None

    @contextmanager
    def during(self, piece: Piece) -> Iterator[None]:
        """The exchange that goes up inside the ``with`` block is that piece of a step."""
        self.piece = piece
        try:
            yield
        finally:
            self.piece = None

    def place(self, weight: float) -> Place:
        """Where the exchange that goes up now belongs; ``weight`` is its loss items, if the loop does not say."""
        even = 1.0 / self.accumulation  # whoever does not say more has exchanges of equal size
        piece = self.piece or Piece(self._begun + 1, self.accumulation, even, even, weight)
        if piece.number == 1:
            self._number = self.done + 1
        if self.piece is None:
            self.done += int(piece.last)
        self._begun = 0 if piece.last else piece.number
        return Place(self._number, piece.number, piece.of, piece.tokens, piece.weight)

    def abandon(self) -> None:
        """Begin a new step with the next exchange."""
        self._begun = 0
        self._previous = None

    def remember(self, call: Answerable) -> None:
        """For :meth:`refuse_half_steps`."""
        if self.accumulation > 1:
            self._previous = call

    def refuse_half_steps(self, personal: Iterable[nn.Parameter]) -> None:
        """Refuse to go on if the optimiser stepped too early.

        Gradients that were there and are gone show that it did: a fused optimiser leaves no other sign.

        Raises:
            ConfigError: it did.
        """
        if self.piece is not None or not self._begun or self._previous is None or not self._previous.answered:
            return
        parameters = list(personal)
        if parameters and all(parameter.grad is None for parameter in parameters):
            raise ConfigError(
                f"the optimiser stepped after {self._begun} of the accumulation = {self.accumulation} exchanges that "
                "the server was told to expect in a step; drop the last, shorter group of an epoch "
                "(examples = a multiple of batch size × accumulation), or use part_of_step"
            )


def loss_items(labels: Tensor) -> int:
    """How many items a model's loss is a mean of: classified examples, or predicted tokens.

    Labels of classes are (B,); labels of tokens are (B, T), −100 where there is no loss, and are shifted by one.
    """
    if labels.dim() == 1:
        return int((labels != -100).sum())
    return int((labels[:, 1:] != -100).sum())


def unmasked_tokens(batch: Mapping[str, Any]) -> int:
    """The tokens that a batch's alignment is a mean over; of images, whose tokens are equally many, their number."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    return int(ids.numel()) if ids is not None else len(batch["labels"])


def items_of(inputs: Mapping[str, Any]) -> float:
    """The items of a batch's loss, for loops that do not say; a batch without any counts as one."""
    labels = inputs.get("labels")
    if isinstance(labels, Tensor):
        return float(max(1, loss_items(labels)))
    return float(len(next(value for value in inputs.values() if isinstance(value, Tensor))))
