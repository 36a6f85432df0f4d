"""What the data room hands out: encoded examples by client, and the task that made them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

from flexp.kinds import ModelKind

Example = dict[str, Any]
"""One encoded example: ``input_ids``, ``attention_mask``, ``labels`` ... as lists, or ``pixel_values`` as a tensor.
``cut`` is there when text was cut off, and says how many tokens."""

Row = Mapping[str, Any]
"""One row of the data, plus :data:`PLACE`."""

PLACE = "\x00place"
"""Key under which a row carries where it stands (file and line), for messages."""

Batch = dict[str, Tensor]
Forward = Callable[[Batch], Any]
"""A whole or a split model: takes a batch without labels, returns something with ``.logits``."""


@dataclass
class Tally:
    """What scoring found, one entry per example."""

    loss: list[float] = field(default_factory=list)  # summed over the example's items
    items: list[int] = field(default_factory=list)  # labelled tokens, or 1
    correct: list[bool] = field(default_factory=list)  # empty when the task has no right answer
    targets: list[Any] = field(default_factory=list)  # what is right (a class, a number), likewise
    answers: list[Any] = field(default_factory=list)  # what the model gave, as the task's scores need it

    def extend(self, other: Tally) -> None:
        """Append the entries of ``other``."""
        for entry in fields(self):
            getattr(self, entry.name).extend(getattr(other, entry.name))

    @property
    def broken(self) -> int:
        """How many examples the model did not answer with finite numbers: of a loss that is NaN, or an answer that is a
        number and infinite. (A loss may be infinite where logits of -inf say that an answer cannot be.)"""
        answers = self.answers or [None] * len(self.loss)
        return sum(
            math.isnan(loss) or (isinstance(answer, float) and not math.isfinite(answer))
            for loss, answer in zip(self.loss, answers, strict=True)
        )

    def reordered(self, order: Sequence[int]) -> Tally:
        """The same with the entries in another order; what the task leaves empty stays so."""
        every = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return Tally(**{name: [values[k] for k in order] if values else [] for name, values in every.items()})


class Task(Protocol):
    """How rows become examples, examples batches, and logits scores."""

    @property
    def name(self) -> str:
        """The task's name in the configuration."""

    @property
    def model_kind(self) -> ModelKind:
        """Which head the model needs."""

    @property
    def processor(self) -> Any:
        """The tokenizer of a text's task, or the image processor."""

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes by index, the same for every client; None without a classifier."""

    @property
    def metric(self) -> str:
        """The name of the score by which models are compared."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is the better one."""

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Encode the rows of one split of one client.

        Raises:
            DataError: a row cannot be encoded; the message names its place.
        """

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A padded batch, with ``labels`` (-100 where there is no loss)."""

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Losses and hits of a collated batch."""

    def class_weights(self, wanted: Any, examples: Sequence[Example]) -> Tensor:
        """``train.class_weights`` for a client with these training examples, by the number of the class."""

    def figures(self, tally: Tally) -> dict[str, Any]:
        """The scores of all examples, the metric among them, from what :meth:`measure` found."""

    def details(self, tally: Tally) -> dict[str, Any]:
        """Tables that are kept at the beginning and the end of a run only: scores by class, confusions."""

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """What to write of each example."""

    def by_row(self, found: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The same of each row, of which there may be several examples."""

    def score(self, forward: Forward, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Further scores that need forward passes of their own; usually none."""


@dataclass(frozen=True)
class ClientData:
    """One client's private examples; no example is in two of the lists."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Federation:
    """All clients' data, the task they share, and remarks for the user."""

    clients: list[ClientData]
    task: Task
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what is suspicious about the data

    @property
    def remarks(self) -> list[str]:
        """What to tell the user before anything is trained: notes, then warnings."""
        return [*self.notes, *(f"warning: {line}" for line in self.warnings)]

    @property
    def test(self) -> list[Example]:
        """Everybody's test examples: those of all clients, in the clients' order."""
        return list(chain.from_iterable(client.test for client in self.clients))
