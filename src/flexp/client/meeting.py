"""Meetings: clients make one classifier of all their class statistics, and go their own way from there.

Before the first step all begin with the classifier in closed form of everybody's sums. After the last step they meet
again, since features are others by then, and each makes its own of it (:mod:`flexp.client.personal_head`). Features φ
are what enters the classifier. Three sums cross at a meeting: how often each class was seen; class statistics, without
the classes that fewer than ``method.meet.min_examples`` examples have, whose means would show them; and the loss that
each shrinkage and temperature has left out, so that all choose the same. Everything else each client computes for
itself; the classifier itself never crosses. What stands here for classes holds for numbers alike
(:mod:`flexp.client.ridge`), and for tokens, each of which is an example.

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
from flexp.client.personal_head import Agreed, Choice, Common, choose
from flexp.client.ridge import STRENGTHS, CommonRidge, Ridge, sums_of_numbers
from flexp.client.trainer import BatchOrder
from flexp.config import MeetConfig, RunConfig
from flexp.data.scores import in_batches
from flexp.data.tasks import task_of
from flexp.data.types import Batch, Example, Task
from flexp.errors import ConfigError
from flexp.gaussian import drawn
from flexp.kinds import IGNORED, KINDS, Answers, take_targets
from flexp.links.asking import OF_A_MEETING
from flexp.links.base import Meter
from flexp.links.sums import Adder, Sums
from flexp.models.heads import AUTO
from flexp.optim import Updater
from flexp.rng import RandomStream

R = TypeVar("R")
Rounds = Generator[Sums, Sums, R]
"""What one client does at a meeting: it yields what is to be added up over all clients, and is sent the sum."""

FIRST, LAST = 0, 1
"""The meetings: before the first step, and after the last."""
HOPELESS = 1e6
"""The most that a client says of a loss; beyond it, where a covariance is no longer one, any number may come out."""
CLOSED: tuple[Answers, ...] = ("class", "tokens", "number")
"""What has a closed form: a class of an example or of each of its tokens, or a number."""

UNMASKED = (
    "method.meet.masked is off: class sums go to the server as they are, and from them a server that knows the "
    "features can tell the labels of clients' examples"
)


RARE = (
    "{} classes have fewer than method.meet.min_examples = {} examples of all who met: they are in no sum, so nobody "
    "has them from others; 1 takes them in, and the mean of a single example is that example"
)


@dataclass(frozen=True)
class Meets:
    """Which meetings a run has."""

    first: bool
    last: bool

    @classmethod
    def of(cls, config: RunConfig) -> Meets:
        """As ``model.head`` and a settled ``method.meet`` say (``auto`` is none); none where the task has no closed
        form."""
        known, meet = closed_form_of(config), config.method.meet.on is True
        return cls(known and (meet or config.model.head == "closed-form"), known and meet)

    def __bool__(self) -> bool:
        return self.first


def closed_form_of(config: RunConfig) -> bool:
    """Whether the task has a closed form."""
    return KINDS[task_of(config.data).model_kind].answers in CLOSED


class Noise:
    """What ``method.meet.noise`` adds to a client's sums, so that no single example shows in them.

    Features in them are no longer than ``clip``; each sum gets Gaussian noise of ``noise`` times what one example can
    change of it. It follows from the key and the very sum, so that who asks again is given the same. Nothing without.
    """

    def __init__(self, config: MeetConfig, key: int) -> None:
        self._noise, self._clip = config.noise, config.clip or 0.0
        self._key = key

    def __call__(self, sums: Sums) -> Sums:
        """The same tensors with noise."""
        if not self._noise:
            return sums
        most = {"counts": 1.0, "sums": self._clip, "square": self._clip**2, "gram": self._clip**2}
        return {
            name: value + self._noise * most[name] * drawn(value.shape, self._key, name.encode(), _bytes_of(value))
            for name, value in sums.items()
        }

    def clipped(self, features_NH: Tensor) -> Tensor:
        """None of them longer."""
        if not self._noise:
            return features_NH
        lengths_N: Tensor = features_NH.norm(dim=1, keepdim=True)
        return features_NH * (self._clip / lengths_N).clamp(max=1.0)


def _bytes_of(value: Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()


@dataclass
class Seat:
    """One client at meetings.

    Attributes:
        examples: its private ones, to train on.
        model: whose classifier it is, a Hugging Face model.
        forward: its personal model, in evaluation mode.
        seed: of the order of examples, where a classifier is trained again.
        meter: of its link; ``None``: nothing crosses for features.
        personal: its classifier is its own from the beginning, and need not be everybody's.
        told: a batch as training may know it (``privacy.label_epsilon``): a classifier that gradients come out of is
            made of that, the last one, of which none do, of the labels as they are.
        noise: the seed of the noise in its sums. A simulation's is known; a client's is drawn where it runs.
        seconds: that its meetings took, waiting for the others not counted.
        rare: classes that its last meeting left out, though somebody has examples of them.
    """

    examples: list[Example]
    task: Task
    model: Any
    forward: Callable[[Batch], Any]
    config: RunConfig
    seed: int
    meter: Meter | None = None
    personal: bool = False
    told: Callable[[Batch], Batch] | None = None
    noise: int | None = None
    seconds: float = 0.0
    rare: int = 0

    def first(self) -> Rounds[dict[str, Tensor]]:
        """The classifier to begin with, as weights by their names in the model."""
        return self._timed(self._first())

    def last(self, *, trained: bool = True) -> Rounds[tuple[dict[str, Tensor], Choice]]:
        """The client's own classifier, and what it is made of; without ``trained`` nothing was, so nothing is chosen.

        What it was is read before anything is yielded, for its modules may be another client's by then.
        """
        return self._timed(self._last(trained))

    def _timed(self, rounds: Rounds[R]) -> Rounds[R]:
        began, given = time.perf_counter(), None
        while True:
            try:
                sums = next(rounds) if given is None else rounds.send(given)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                self.seconds += time.perf_counter() - began
            given = yield sums
            began = time.perf_counter()

    def _first(self) -> Rounds[dict[str, Tensor]]:
        features_NH, labels_N = self.features(self.told)
        common = yield from self._agree(features_NH, labels_N, with_own=False)
        head = common.begin(features_NH, labels_N) if self.personal else common.head()
        return self._weights(head)

    def _last(self, trained: bool) -> Rounds[tuple[dict[str, Tensor], Choice]]:
        features_NH, labels_N = self.features()
        _, layer = classifier_of(self.model)
        before = LinearHead(layer.weight.detach().double().clone(), layer.bias.detach().double().clone())
        common = yield from self._agree(features_NH, labels_N, with_own=True)
        own = common.of(features_NH, labels_N)
        if trained:
            retrain = self._retrain(len(labels_N))
            head, choice = choose(common, own, features_NH, labels_N, before, retrain, own_begin=self.personal)
        else:
            head, choice = common.personal(own, features_NH, labels_N), "closed-form"
        return self._weights(head), choice

    def features(self, told: Callable[[Batch], Batch] | None = None) -> tuple[Tensor, Tensor]:
        """φ of all private examples, (N, H) in float64, and their labels (N,); where tokens have labels, of those."""
        _, layer = classifier_of(self.model)
        seen: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        found: list[Tensor] = []
        labels: list[Tensor] = []
        try:
            counted = nullcontext() if self.meter is None else self.meter.as_training()
            with counted, RandomStream(0, layer.weight.device).active():  # a forward moves others' generator
                for batch, _ in in_batches(self.task.collate, self.examples, self.config.evaluation.batch_size):
                    batch = batch if told is None else told(batch)
                    targets = take_targets(batch)
                    with torch.no_grad():
                        self.forward(batch)
                    features = seen[-1]  # a model that adapts itself for scoring runs more often
                    if self._answers == "tokens":
                        labelled = (targets != IGNORED).to(features.device)
                        features, targets = features[labelled], targets[targets != IGNORED]
                    found.append(features)
                    labels.append(targets)
                    seen.clear()
        finally:
            hook.remove()
        return torch.cat(found).double().cpu(), torch.cat(labels).cpu()

    @property
    def _answers(self) -> Answers:
        return KINDS[self.task.model_kind].answers

    def _agree(self, features_NH: Tensor, labels_N: Tensor, *, with_own: bool) -> Rounds[Agreed]:
        """What all agree on; ``with_own``: and this client's examples of classes that too few of all examples have."""
        meet, number = self.config.method.meet, self._answers == "number"
        classes = 1 if number else len(self.task.label_names or ())
        places_N = torch.zeros(len(labels_N), dtype=torch.long) if number else labels_N
        noised = Noise(meet, self.seed if self.noise is None else self.noise)
        seen_C = torch.bincount(places_N, minlength=classes).float()
        counts_C = (yield noised({"counts": seen_C}))["counts"]
        enough_C = counts_C >= meet.min_examples
        self.rare = int(((counts_C >= 1) & ~enough_C).sum())
        enough_N = enough_C[places_N]

        def sums(which_N: Tensor) -> Statistics:
            x, y = noised.clipped(features_NH[which_N]), labels_N[which_N]
            return sums_of_numbers(x, y, meet.gram) if number else Statistics.of(x, y, classes, meet.gram)

        total = Statistics.from_tensors((yield noised(sums(enough_N).tensors()))).of_classes(enough_C)
        solved = Ridge(total) if number else Discriminant(total)
        own = solved.losses(features_NH, labels_N).nan_to_num(HOPELESS).clamp(max=HOPELESS)
        losses = (yield {"losses": own})["losses"]
        if with_own:
            total = total.plus(sums(~enough_N))
        if isinstance(solved, Ridge):
            return CommonRidge(total, float(STRENGTHS[int(losses.argmin())]))
        return Common(total, *solved.chosen(losses))

    def _weights(self, head: LinearHead) -> dict[str, Tensor]:
        path, layer = classifier_of(self.model)
        return {
            f"{path}.weight": head.weight.to(layer.weight.dtype),
            f"{path}.bias": head.bias.to(layer.bias.dtype),
        }

    def _retrain(self, items: int) -> Callable[[LinearHead, Tensor, Tensor], LinearHead]:
        train, per_example = self.config.train, items / len(self.examples)

        def retrain(head: LinearHead, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
            """As many steps of the client's optimiser as it takes in the run, on batches of as many examples."""
            error = F.mse_loss if self._answers == "number" else F.cross_entropy
            weights = {"weight": nn.Parameter(head.weight.float()), "bias": nn.Parameter(head.bias.float())}
            updater = Updater(weights, train.personal, train.total_steps, weights)
            size = max(1, round(train.batch_size * per_example))  # of tokens there are several
            order = BatchOrder(len(labels_N), size, self.seed)
            x = features_NH.float()
            with torch.enable_grad():
                for step in range(train.total_steps):
                    batch = order.indices(step)
                    error(F.linear(x[batch], *weights.values()).squeeze(-1), labels_N[batch]).backward()  # type: ignore[no-untyped-call]
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


def has_linear_classifier(config: Any, kind: str) -> bool:
    """Whether a classifier of transformers' own with this configuration is one that :func:`classifier_of` takes."""
    try:
        with torch.device("meta"):
            classifier_of(AUTO[kind].from_config(config))
    except Exception:  # there is no such classifier, which loading says better
        return False
    return True


def together(seats: Mapping[str, Rounds[R]], adders: Mapping[str, Adder], meeting: int) -> dict[str, R]:
    """Let clients of one process meet, or one client alone with those of other processes."""
    results: dict[str, R] = {}
    given = {name: next(rounds) for name, rounds in seats.items()}
    for number in range(meeting * OF_A_MEETING, (meeting + 1) * OF_A_MEETING):
        totals = {name: adders[name].give(number, values) for name, values in given.items()}
        for name, total in totals.items():
            try:
                given[name] = seats[name].send(total())
            except StopIteration as end:
                results[name] = end.value
    return results
