"""The closed form of a number for each example: ridge regression from sums over all clients' examples.

Features and the number beside them, (φ, y), are one vector, whose sum and scatter are all that is added up
(:class:`flexp.client.closed_form.Statistics` with one class). With X̃, ỹ centred,

    w = (X̃ᵀX̃ + λI)⁻¹ X̃ᵀỹ        b = ȳ − wᵀx̄

and λ, relative to the mean eigenvalue of X̃ᵀX̃, is the one with the smallest squared error when each example is left
out (exact at that λ: an example's residual divided by 1 − its leverage). A client's own head moves w and b by a ridge
of its own on what the common one leaves over, as far as its own examples, each left out, ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexp.client.closed_form import LinearHead, Statistics
from flexp.client.personal_head import BY_HEART, clearly_better

STRENGTHS = torch.logspace(-4.0, 3.0, 15, dtype=torch.float64)
"""Of λ, relative to the mean eigenvalue."""
FEW = 16
"""With fewer own examples a client has everybody's head."""


class Ridge:
    """All heads that sums allow. ``total``: of (φ, y)."""

    def __init__(self, total: Statistics) -> None:
        self.examples = float(total.counts.sum())
        mean = total.sums[0] / max(self.examples, 1.0)
        self.mean_H, self.level = mean[:-1], mean[-1]
        width = len(self.mean_H)
        self.variance = 1.0
        self.values = torch.zeros(width, dtype=torch.float64)  # eigenvalues of X̃ᵀX̃
        self.basis, product = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        if total.gram is not None and self.examples >= 2:
            scatter = total.gram - self.examples * torch.outer(mean, mean)
            self.values, self.basis = torch.linalg.eigh(scatter[:-1, :-1])
            self.values, product = self.values.clamp(min=0.0), scatter[:-1, -1]
            self.variance = max(float(scatter[-1, -1]) / self.examples, 1e-12)
        self.product_H = self.basis.T @ product

    def head(self, strength: float) -> LinearHead:
        """w (1, H) and b (1,)."""
        weight = self.basis @ (self.product_H / self._ridged(strength))
        return LinearHead(weight[None], (self.level - weight @ self.mean_H)[None])

    def left_out(self, features_NH: Tensor, labels_N: Tensor, strength: float) -> Tensor:
        """How far each of the examples, (N,), lies from what all others say of it."""
        head = self.head(strength)
        rotated = (features_NH - self.mean_H) @ self.basis
        leverage = 1.0 / max(self.examples, 1.0) + (rotated.square() / self._ridged(strength)).sum(1)
        return (labels_N.double() - head(features_NH)[:, 0]) / (1.0 - leverage).clamp(min=1e-6)

    def losses(self, features_NH: Tensor, labels_N: Tensor) -> Tensor:
        """The squared error of each λ, summed over the examples left out, relative to the numbers' variance."""
        errors = [self.left_out(features_NH, labels_N, float(strength)).square().sum() for strength in STRENGTHS]
        return torch.stack(errors) / self.variance

    def _ridged(self, strength: float) -> Tensor:
        return self.values + max(strength * float(self.values.mean()), 1e-12)


@dataclass(frozen=True)
class CommonRidge:
    """What all clients agree on: everybody's sums, and λ; see :class:`flexp.client.personal_head.Agreed`."""

    total: Statistics
    strength: float

    def head(self) -> LinearHead:
        return Ridge(self.total).head(self.strength)

    def of(self, features_NH: Tensor, labels_N: Tensor) -> Statistics:
        return sums_of_numbers(features_NH, labels_N, self.total.gram is not None)

    def personal(self, own: Statistics, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        found = Ridge(self.total)
        head = found.head(self.strength)
        if len(labels_N) < FEW:
            return head
        over_N = found.left_out(features_NH, labels_N, self.strength)
        more, best = None, float(over_N.square().sum())
        mine = Ridge(sums_of_numbers(features_NH, over_N, True))
        for strength in (*STRENGTHS.tolist(), 1e9):  # the last: another level alone
            cost = float(mine.left_out(features_NH, over_N, strength).square().sum())
            if cost < best:
                more, best = mine.head(strength), cost
        if more is not None:
            head = LinearHead(head.weight + more.weight, head.bias + more.bias)
        return self._alone(features_NH, labels_N, best) or head

    def begin(self, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        cost = float(Ridge(self.total).left_out(features_NH, labels_N, self.strength).square().sum())
        return self._alone(features_NH, labels_N, cost) or self.head()

    def _alone(self, features_NH: Tensor, labels_N: Tensor, most: float) -> LinearHead | None:
        """The ridge of these examples alone, if its error with each left out is clearly better than ``most``."""
        found = Ridge(sums_of_numbers(features_NH, labels_N, True))
        losses = found.losses(features_NH, labels_N) * found.variance
        if len(labels_N) < FEW or not clearly_better(float(losses.min()), most, self.by_heart(labels_N)):
            return None
        return found.head(float(STRENGTHS[int(losses.argmin())]))

    def without(self, gone: Statistics) -> CommonRidge:
        return replace(self, total=self.total.without(gone))

    def loss(self, answers: Tensor, labels_N: Tensor) -> float:
        return float((answers[:, 0] - labels_N.double()).square().sum())

    def no_surer(self, head: LinearHead, than: LinearHead, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        """As it is: a number is not sure of anything."""
        return head

    def by_heart(self, labels_N: Tensor) -> float:
        """A share of what the numbers scatter."""
        return BY_HEART * float((labels_N.double() - labels_N.double().mean()).square().sum())


def sums_of_numbers(features_NH: Tensor, labels_N: Tensor, gram: bool) -> Statistics:
    """Sums over one party's (φ, y)."""
    rows = torch.cat([features_NH.double(), labels_N.double()[:, None]], dim=1)
    return Statistics.of(rows, torch.zeros(len(rows), dtype=torch.long), 1, gram)
