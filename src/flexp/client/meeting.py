"""Meetings: clients make one classifier of all their class statistics, and go their own way from there.

Before the first step all begin with the classifier in closed form of everybody's sums. After the last step they meet
again, since features are others by then, and each makes its own of it (:mod:`flexp.client.personal_head`). Features φ
are what enters the classifier. Two sums cross at a meeting: class statistics, and then the loss that each shrinkage and
temperature has left out, so that all choose the same. Everything else each client computes for itself; the classifier
itself never crosses.

How sums are added is the business of an :class:`flexp.links.sums.Adder`; over a link they are masked
(:mod:`flexp.client.adding`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.client.closed_form import Discriminant, LinearHead, Statistics
from flexp.client.personal_head import Choice, Common, choose, personal_head
from flexp.client.trainer import BatchOrder
from flexp.config import RunConfig, TrainConfig
from flexp.data.measures import in_batches
from flexp.data.tasks import task_of
from flexp.data.types import Batch, Example, Task
from flexp.errors import ConfigError
from flexp.kinds import KINDS, take_targets
from flexp.links.base import Meter
from flexp.links.sums import Adder, Sums
from flexp.optim import Updater
from flexp.rng import RandomStream

R = TypeVar("R")
Rounds = Generator[Sums, Sums, R]
"""What one client does at a meeting: it yields what is to be added up over all clients, and is sent the sum."""

FIRST, LAST = 0, 1
"""The meetings: before the first step, and after the last."""
ROUNDS = 2
"""Sums at one meeting."""

UNMASKED = (
    "method.meet.masked is off: class sums go to the server as they are, and from them a server that knows the "
    "features can tell the labels of clients' examples"
)


@dataclass(frozen=True)
class Meets:
    """Which meetings a run has."""

    first: bool
    last: bool

    @classmethod
    def of(cls, config: RunConfig) -> Meets:
        """As ``model.head`` and ``method.meet`` say; none where the task has no closed form."""
        known, meet = closed_form_of(config), config.method.meet.on
        return cls(known and (meet or config.model.head == "closed-form"), known and meet)

    def __bool__(self) -> bool:
        return self.first


def closed_form_of(config: RunConfig) -> bool:
    """Whether the task has a closed form: one class for each example."""
    return KINDS[task_of(config.data).model_kind].answers == "class"


@dataclass
class Seat:
    """One client at meetings.

    Attributes:
        examples: its private ones, to train on.
        model: whose classifier it is, a Hugging Face model.
        forward: its personal model, in evaluation mode.
        seed: of the order of examples, where a classifier is trained again.
        meter: of its link; ``None``: nothing crosses for features.
        seconds: that its meetings took, waiting included.
    """

    examples: list[Example]
    task: Task
    model: Any
    forward: Callable[[Batch], Any]
    config: RunConfig
    seed: int
    meter: Meter | None = None
    seconds: float = 0.0

    def first(self) -> Rounds[dict[str, Tensor]]:
        """Everybody's classifier, as weights by their names in the model."""
        began = time.perf_counter()
        features_NH, labels_N = self.features()
        common = yield from self._agree(features_NH, labels_N)
        self.seconds += time.perf_counter() - began
        return self._weights(common.head())

    def last(self, *, trained: bool = True) -> Rounds[tuple[dict[str, Tensor], Choice]]:
        """The client's own classifier, and what it is made of; without ``trained`` nothing was, so nothing is chosen.

        What it was is read before anything is yielded, for its modules may be another client's by then.
        """
        began = time.perf_counter()
        features_NH, labels_N = self.features()
        path, layer = classifier_of(self.model)
        before = LinearHead(layer.weight.detach().double().clone(), layer.bias.detach().double().clone())
        common = yield from self._agree(features_NH, labels_N)
        own = self._statistics(features_NH, labels_N)
        if trained:
            head, choice = choose(common, own, features_NH, labels_N, before, self._retrain(path))
        else:
            head, choice = personal_head(common, own, features_NH, labels_N), "closed-form"
        self.seconds += time.perf_counter() - began
        return self._weights(head), choice

    def features(self) -> tuple[Tensor, Tensor]:
        """φ of all private examples (N, H) in float64, and their labels (N,)."""
        _, layer = classifier_of(self.model)
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        found: list[Tensor] = []
        labels: list[Tensor] = []
        try:
            counted = nullcontext() if self.meter is None else self.meter.as_training()
            with counted, RandomStream(0, layer.weight.device).active():  # a forward moves others' generator
                for batch, _ in in_batches(self.task.collate, self.examples, self.config.evaluation.batch_size):
                    labels.append(take_targets(batch))
                    with torch.no_grad():
                        self.forward(batch)
                    found.append(seen[-1])  # a model that adapts itself for scoring runs more often
                    seen.clear()
        finally:
            hook.remove()
        return torch.cat(found).double().cpu(), torch.cat(labels).cpu()

    def _agree(self, features_NH: Tensor, labels_N: Tensor) -> Rounds[Common]:
        own = self._statistics(features_NH, labels_N)
        total = Statistics.from_tensors((yield own.tensors()))
        found = Discriminant(total)
        losses = yield {"losses": found.losses(features_NH, labels_N)}
        return Common(total, *found.chosen(losses["losses"]))

    def _statistics(self, features_NH: Tensor, labels_N: Tensor) -> Statistics:
        names = self.task.label_names
        assert names is not None
        return Statistics.of(features_NH, labels_N, len(names), self.config.method.meet.gram)

    def _weights(self, head: LinearHead) -> dict[str, Tensor]:
        path, layer = classifier_of(self.model)
        return {
            f"{path}.weight": head.weight.to(layer.weight.dtype),
            f"{path}.bias": head.bias.to(layer.bias.dtype),
        }

    def _retrain(self, path: str) -> Callable[[LinearHead, Tensor, Tensor], LinearHead]:
        train: TrainConfig = self.config.train

        def retrain(head: LinearHead, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
            """As many steps of the client's optimiser as it takes in the run, on batches of as many examples."""
            weights = {"weight": nn.Parameter(head.weight.float()), "bias": nn.Parameter(head.bias.float())}
            updater = Updater(weights, train.personal, train.total_steps, weights)
            order = BatchOrder(len(labels_N), train.batch_size, self.seed)
            x = features_NH.float()
            with torch.enable_grad():
                for step in range(train.total_steps):
                    batch = order.indices(step)
                    F.cross_entropy(F.linear(x[batch], *weights.values()), labels_N[batch]).backward()  # type: ignore[no-untyped-call]
                    updater.step()
            return LinearHead(weights["weight"].detach().double(), weights["bias"].detach().double())

        return retrain


def classifier_of(model: Any) -> tuple[str, nn.Linear]:
    """The name and the layer whose output is a classifier's logits.

    Raises:
        ConfigError: it has none with a bias, which a closed form needs.
    """
    linear = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    path, layer = linear[-1] if linear else ("", None)
    if layer is None or layer.out_features != model.config.num_labels or layer.bias is None:
        raise ConfigError(
            f"the classifier of {type(model).__name__} is no linear layer with a bias, which a closed form is: set "
            'model.pooling = "mean" (or "last")'
        )
    return path, layer


def together(seats: Mapping[str, Rounds[R]], adders: Mapping[str, Adder], meeting: int) -> dict[str, R]:
    """Let clients of one process meet, or one client alone with those of other processes."""
    results: dict[str, R] = {}
    given = {name: next(rounds) for name, rounds in seats.items()}
    for number in range(meeting * ROUNDS, (meeting + 1) * ROUNDS):
        totals = {name: adders[name].give(number, values) for name, values in given.items()}
        for name, total in totals.items():
            try:
                given[name] = seats[name].send(total())
            except StopIteration as end:
                results[name] = end.value
    return results
