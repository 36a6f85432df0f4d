"""One client's own classifier, from everybody's sums and its own private examples, on which alone it is chosen.

Three things make the closed form of everybody's sums (:mod:`flexp.client.closed_form`) the client's own: how often it
sees each class, what its classes look like, and what it has trained. The first two have one number each, which the
client's examples choose; of the third, the closed form, the trained classifier or both together answer, whichever has
clearly the smaller loss on examples that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from flexp.client.closed_form import UNSEEN, Discriminant, LinearHead, Statistics, loss, personal_means

KAPPAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
CONCENTRATIONS = torch.logspace(-0.5, 5.0, 30, dtype=torch.float64)
FEW = 16
"""With fewer examples whose class the client has seen twice, its class means are everybody's."""
FOLDS = 4
CLEARLY = 0.9
BY_HEART = 0.25
"""A loss of less, in nats an example, is no evidence: after training features know these very examples by heart."""

Choice = Literal["closed-form", "trained", "both"]
Retrain = Callable[[LinearHead, Tensor, Tensor], LinearHead]
"""Trains a head on features and labels, as the client has trained its classifier."""


class Agreed(Protocol):
    """What all clients agree on at a meeting, for one kind of answer."""

    @property
    def total(self) -> Statistics:
        """Everybody's sums."""
        ...

    def head(self) -> LinearHead:
        """One head for all."""
        ...

    def begin(self, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        """What a client begins with whose head is its own."""
        ...

    def of(self, features_NH: Tensor, labels_N: Tensor) -> Statistics:
        """A party's own sums."""
        ...

    def personal(self, own: Statistics, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        """One client's own head."""
        ...

    def without(self, gone: Statistics) -> Agreed:
        """The same of those examples that are not in ``gone``."""
        ...

    def loss(self, answers: Tensor, labels_N: Tensor) -> float:
        """Of a head's answers, summed."""
        ...

    def no_surer(self, head: LinearHead, than: LinearHead, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        """``head``, but on these examples, which both know by heart, no surer than the other."""
        ...

    def by_heart(self, labels_N: Tensor) -> float:
        """So small a loss of these examples is no evidence (:data:`BY_HEART`)."""
        ...


@dataclass(frozen=True)
class Common:
    """What all clients agree on: everybody's sums, and the shrinkage and temperature that they chose together."""

    total: Statistics
    gamma: float
    temperature: float

    def head(self) -> LinearHead:
        """See :class:`Agreed`, as for all that follows."""
        return Discriminant(self.total).head(self.gamma, self.temperature)

    def begin(self, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        return begin(self, features_NH, labels_N)

    def of(self, features_NH: Tensor, labels_N: Tensor) -> Statistics:
        return Statistics.of(features_NH, labels_N, len(self.total.counts), self.total.gram is not None)

    def personal(self, own: Statistics, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        return personal_head(self, own, features_NH, labels_N)

    def without(self, gone: Statistics) -> Common:
        return replace(self, total=self.total.without(gone))

    def loss(self, answers: Tensor, labels_N: Tensor) -> float:
        return loss(answers, labels_N)

    def no_surer(self, head: LinearHead, than: LinearHead, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        """Scaled down until its loss is no smaller."""
        logits_NC, least = head(features_NH), loss(than(features_NH), labels_N)
        if loss(logits_NC, labels_N) >= least or loss(0.0 * logits_NC, labels_N) <= least:
            return head
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if loss(middle * logits_NC, labels_N) < least else (middle, high)
        return LinearHead(low * head.weight, low * head.bias)

    def by_heart(self, labels_N: Tensor) -> float:
        return BY_HEART * len(labels_N)


def mean_head(one: LinearHead, other: LinearHead) -> LinearHead:
    """The head whose answers are the means of two heads' answers."""
    return LinearHead((one.weight + other.weight) / 2, (one.bias + other.bias) / 2)


def log_prior(counts_C: Tensor, total_C: Tensor) -> tuple[Tensor, float]:
    """How often a client will see each class, log π (C,), and the concentration a behind it.

    π = (n_k + a·p)/(N_k + a) with p everybody's (smoothed) frequencies. a has the largest evidence of the client's
    own counts under a Dirichlet–multinomial (empirical Bayes): large where the client is like everybody.
    """
    base_C = (total_C + 1) / (total_C + 1).sum()
    weight = CONCENTRATIONS[:, None] * base_C
    evidence = torch.lgamma(weight + counts_C) - torch.lgamma(weight)
    size = torch.lgamma(CONCENTRATIONS) - torch.lgamma(CONCENTRATIONS + counts_C.sum())
    a = float(CONCENTRATIONS[int((size + evidence.sum(1)).argmax())])
    return torch.log((counts_C + a * base_C) / (counts_C.sum() + a)), a


def clearly_better(loss: float, than: float, by_heart: float) -> bool:
    """Whether one head's loss on a client's own examples tells against another's; ``by_heart``: what does not count."""
    return loss + by_heart < CLEARLY * (than + by_heart)


def personal_head(common: Common, own: Statistics, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
    """The closed form with the client's own prior and its own class means, whose κ its examples choose; or, where they
    are answered better so, of its own examples alone, without anybody's."""
    found = Discriminant(common.total)
    prior_C, a = log_prior(own.counts, common.total.counts)
    base_C = (common.total.counts + 1) / (common.total.counts + 1).sum()
    # Of each example without itself: the prior of its class is that of one count less.
    without_NC = (own.counts + a * base_C).repeat(len(labels_N), 1)
    without_NC[torch.arange(len(labels_N)), labels_N] -= 1
    without_NC = torch.log(without_NC.clamp(min=1e-12) / (own.counts.sum() - 1 + a))
    best, means_CH = torch.inf, None
    for kappa in (*KAPPAS, None):
        logits, possible = found.left_out(features_NH, labels_N, common.gamma, own, 1e9 if kappa is None else kappa)
        if int(possible.sum()) < FEW:
            break
        cost = loss((common.temperature * logits + without_NC)[possible], labels_N[possible])
        if cost <= best:
            best, means_CH = cost, None if kappa is None else personal_means(own, found.means, kappa)
    head = found.head(common.gamma, common.temperature, means_CH)
    logits, possible = found.left_out(features_NH, labels_N, common.gamma)
    seen = possible & (own.counts[labels_N] >= 2)  # of the others the client knows no second example of their class
    rest = loss((common.temperature * logits + without_NC)[possible & ~seen], labels_N[possible & ~seen])
    alone = _alone(features_NH, labels_N, without_NC, possible, best + rest)
    head = head if alone is None else alone
    return LinearHead(head.weight, head.bias + prior_C)


def begin(common: Common, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
    """What a client whose classifier is its own begins with: everybody's, or its own examples' where that is better."""
    logits, possible = Discriminant(common.total).left_out(features_NH, labels_N, common.gamma)
    cost = loss(common.temperature * logits[possible], labels_N[possible])
    alone = _alone(features_NH, labels_N, torch.zeros_like(logits), possible, cost)
    return common.head() if alone is None else alone


def _alone(
    features_NH: Tensor, labels_N: Tensor, prior_NC: Tensor, possible_N: Tensor, most: float
) -> LinearHead | None:
    """The closed form of these examples alone, if its loss with each left out is clearly better than ``most``.

    Those whose class has no second example count as classes without any do (:data:`UNSEEN`).
    """
    found = Discriminant(Statistics.of(features_NH, labels_N, prior_NC.shape[1]))
    gamma, temperature = found.chosen(found.losses(features_NH, labels_N))
    logits, again = found.left_out(features_NH, labels_N, gamma)
    again &= possible_N
    if int(again.sum()) < FEW:
        return None
    cost = loss((temperature * logits + prior_NC)[again], labels_N[again]) + UNSEEN * int((possible_N & ~again).sum())
    return found.head(gamma, temperature) if clearly_better(cost, most, BY_HEART * int(possible_N.sum())) else None


def choose(
    common: Agreed,
    own: Statistics,
    features_NH: Tensor,
    labels_N: Tensor,
    trained: LinearHead,
    retrain: Retrain,
    *,
    own_begin: bool = False,
) -> tuple[LinearHead, Choice]:
    """The client's head: its own closed form (:meth:`Agreed.personal`) and the ``trained`` one together, or one of
    them that answers clearly better alone.

    Cross-fitted: each of a few folds is answered by heads that were made without it. What was trained has seen all
    examples, so in its place stands one that ``retrain`` makes of the others, beginning with their closed form
    (``own_begin``: with :meth:`Agreed.begin`, as the client did). A trained one that is worse than these on the very
    examples it saw was averaged with clients who differ, and is judged itself.
    """
    whole = common.personal(own, features_NH, labels_N)
    if len(labels_N) < 2 * FOLDS:
        return whole, "closed-form"

    def anew(less: Agreed, x_MH: Tensor, y_M: Tensor) -> LinearHead:
        return retrain(less.begin(x_MH, y_M) if own_begin else less.head(), x_MH, y_M)

    folds: list[tuple[Tensor, LinearHead, LinearHead]] = []
    place = torch.empty(len(labels_N), dtype=torch.long)
    place[labels_N.argsort(stable=True)] = torch.arange(len(labels_N))  # each class falls evenly into all folds
    for fold in range(FOLDS):
        out = place % FOLDS == fold
        x, y = features_NH[~out], labels_N[~out]
        gone = common.of(features_NH[out], labels_N[out])
        less = common.without(gone)
        closed = less.personal(own.without(gone), x, y)
        again = anew(less, x, y)
        folds.append((out, common.no_surer(closed, again, x, y), again))
    unseen = sum(common.loss(again(features_NH[out]), labels_N[out]) for out, _, again in folds)
    averaged = common.loss(trained(features_NH), labels_N) > unseen
    cost: dict[Choice, float] = {"closed-form": 0.0, "trained": 0.0, "both": 0.0}
    for out, closed, again in folds:
        other = trained if averaged else again
        heads: dict[Choice, LinearHead] = {"closed-form": closed, "trained": other, "both": mean_head(closed, other)}
        for name, head in heads.items():
            cost[name] += common.loss(head(features_NH[out]), labels_N[out])
    than = anew(common, features_NH, labels_N) if averaged else trained
    whole = common.no_surer(whole, than, features_NH, labels_N)
    best = min(cost, key=cost.__getitem__)
    choice: Choice = best if clearly_better(cost[best], cost["both"], common.by_heart(labels_N)) else "both"
    return {"closed-form": whole, "trained": trained, "both": mean_head(whole, trained)}[choice], choice
