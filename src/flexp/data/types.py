"""What the data room hands out: encoded examples by client, and the task that made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    targets: list[int] = field(default_factory=list)  # the right class, likewise

    def extend(self, other: Tally) -> None:
        """Append the entries of ``other``."""
        self.loss += other.loss
        self.items += other.items
        self.correct += other.correct
        self.targets += other.targets


class Task(Protocol):
    """How rows become examples, examples batches, and logits scores."""

    @property
    def name(self) -> str:
        """The task's name in the configuration."""

    @property
    def model_kind(self) -> ModelKind:
        """Which head the model needs."""

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes by index, the same for every client; None without a classifier."""

    @property
    def metric(self) -> str:
        """``accuracy`` or ``perplexity``."""

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
