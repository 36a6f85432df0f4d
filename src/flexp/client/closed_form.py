"""A classifier in closed form from sums over examples: the linear discriminant with shrinkage.

Of features φ (H numbers an example) and labels, everything here needs only sums: how many examples a class has (n_c),
the sum of their features (S_c), Σ ‖φ‖², and if asked Σ φφᵀ. Sums of several clients add up, so clients that share
nothing else have one classifier of all their examples:

    Σ = (1 − γ) Σ_within + γ · tr(Σ_total)/H · I        W = T Σ⁻¹ μ        b_c = −T/2 · μ_cᵀ Σ⁻¹ μ_c

(Friedman, "Regularized Discriminant Analysis", 1989). Shrinkage γ and temperature T are those with the smallest loss
when every example is left out of the sums in its turn; what that changes is of rank one, so it is exact and costs one
eigendecomposition. Without Σ φφᵀ, γ = 1: the nearest class mean. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
TEMPERATURES = torch.logspace(-1.3, 0.3, 12, dtype=torch.float64)
UNSEEN = 10.0
"""A class without any example is so far, in logits, below the least likely one."""


@dataclass(frozen=True)
class Statistics:
    """Sums over examples. Shapes: ``counts`` (C,), ``sums`` (C, H), ``square`` (), ``gram`` (H, H) or none."""

    counts: Tensor
    sums: Tensor
    square: Tensor
    gram: Tensor | None

    @classmethod
    def of(cls, features_NH: Tensor, labels_N: Tensor, classes: int, gram: bool = True) -> Statistics:
        """Of one party's examples."""
        features_NH = features_NH.double()
        sums = torch.zeros(classes, features_NH.shape[1], dtype=torch.float64).index_add_(0, labels_N, features_NH)
        counts = torch.bincount(labels_N, minlength=classes).double()
        return cls(counts, sums, features_NH.square().sum(), features_NH.T @ features_NH if gram else None)

    def tensors(self) -> dict[str, Tensor]:
        """What crosses a link, in float32; of the symmetric ``gram`` one triangle."""
        found = {"counts": self.counts, "sums": self.sums, "square": self.square.reshape(1)}
        if self.gram is not None:
            rows, columns = torch.triu_indices(*self.gram.shape)
            found["gram"] = self.gram[rows, columns]
        return {name: value.float() for name, value in found.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Statistics:
        """From :meth:`tensors`, or a sum of such."""
        found = {name: value.double() for name, value in tensors.items()}
        gram = None
        if "gram" in found:
            width = found["sums"].shape[1]
            rows, columns = torch.triu_indices(width, width)
            gram = torch.zeros(width, width, dtype=torch.float64)
            gram[rows, columns] = gram[columns, rows] = found["gram"]
        return cls(found["counts"], found["sums"], found["square"].reshape(()), gram)

    def without(self, other: Statistics) -> Statistics:
        """The sums over the examples that ``other`` does not have."""
        gram = None if self.gram is None or other.gram is None else self.gram - other.gram
        counts = (self.counts - other.counts).round()
        return Statistics(counts, self.sums - other.sums, self.square - other.square, gram)

    def plus(self, other: Statistics) -> Statistics:
        """The sums over the examples of both."""
        gram = None if self.gram is None or other.gram is None else self.gram + other.gram
        return Statistics(self.counts + other.counts, self.sums + other.sums, self.square + other.square, gram)

    def of_classes(self, which_C: Tensor) -> Statistics:
        """Where nothing but noise is in the other classes, and noise has made nothing negative."""
        counts = torch.where(which_C, self.counts.clamp(min=1.0), 0.0)
        return Statistics(counts, self.sums * which_C[:, None], self.square.clamp(min=0.0), self.gram)

    @property
    def means(self) -> Tensor:
        """Of each class, (C, H); zeros of one without examples."""
        return self.sums / self.counts.clamp(min=1.0)[:, None]


@dataclass(frozen=True)
class LinearHead:
    """Logits φ Wᵀ + b: ``weight`` (C, H), ``bias`` (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features_NH: Tensor) -> Tensor:
        return features_NH.double() @ self.weight.T + self.bias


class Discriminant:
    """All heads that sums allow, for whatever shrinkage, and each example's answer without itself."""

    def __init__(self, total: Statistics) -> None:
        self.total, self.means = total, total.means
        self.examples, width = float(total.counts.sum()), total.sums.shape[1]
        self.mean = total.sums.sum(0) / max(self.examples, 1.0)
        self.free = self.examples - float((total.counts > 0).sum())  # degrees of freedom within classes
        self.scatter = float(total.square - self.examples * self.mean.square().sum())  # the trace of the total one
        self.basis: Tensor | None = None
        self.within = torch.zeros(width, dtype=torch.float64)  # the eigenvalues of the scatter within classes
        if total.gram is not None and self.free >= 1:
            inside = total.gram - (self.means * total.counts[:, None]).T @ self.means
            self.within, self.basis = torch.linalg.eigh((inside + inside.T) / 2)
            self.within = self.within.clamp(min=0.0)

    @property
    def gammas(self) -> tuple[float, ...]:
        """The shrinkages that can be chosen from."""
        return GAMMAS if self.basis is not None else (1.0,)

    def head(self, gamma: float, temperature: float, means_CH: Tensor | None = None) -> LinearHead:
        """The classifier; ``means_CH``: of other class means."""
        scale_H = 1.0 / self._spread(gamma, self.free, self.scatter, self.examples)
        means_CH = self._rotated(self.means if means_CH is None else means_CH)
        weight = means_CH * scale_H
        bias = -0.5 * (weight * means_CH).sum(1)
        if self.basis is not None:
            weight = weight @ self.basis.T
        return LinearHead(temperature * weight, self._below(temperature * bias))

    def left_out(
        self,
        features_NH: Tensor,
        labels_N: Tensor,
        gamma: float,
        own: Statistics | None = None,
        kappa: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The logits (N, C), at T = 1, that each of the examples gets from the sums of all others; and for which of
        them, (N,), that is possible: others of its class are left.

        Args:
            own: sums of the party whose examples these are, for its personal class means (:func:`personal_means`).
        """
        y, n, rows = labels_N, self.total.counts[labels_N], torch.arange(len(labels_N))
        possible = n >= 2 if own is None else (n >= 2) & (own.counts[y] >= 2)
        fewer = (n - 1).clamp(min=1.0)[:, None]
        class_NH = (self.total.sums[y] - features_NH) / fewer
        means_CH = self.means
        if own is not None:
            class_NH = (own.sums[y] - features_NH + kappa * class_NH) / (own.counts[y] - 1 + kappa)[:, None]
            means_CH = personal_means(own, self.means, kappa)
        # In the basis of the scatter within classes; what one example takes out of that is of rank one (r rᵀ n/(n−1)).
        rest, others = self.examples - 1, max(self.free - 1, 1.0)
        away_N = (features_NH - self.mean).square().sum(1) * self.examples / max(rest, 1.0)
        scale_NH = 1.0 / self._spread(gamma, others, (self.scatter - away_N)[:, None], rest)
        x, m, own_m = self._rotated(features_NH), self._rotated(means_CH), self._rotated(class_NH)
        r = self._rotated(features_NH - self.means[y])
        weight_N = (1.0 - gamma) / others * n / fewer[:, 0]
        scaled_r = scale_NH * r
        weight_N = weight_N / (1.0 - weight_N * (scaled_r * r).sum(1)).clamp(min=1e-12)
        along_x = (scaled_r * x).sum(1)

        def logits(linear: Tensor, squared: Tensor, along: Tensor) -> Tensor:
            shape = (-1,) + (1,) * (linear.dim() - 1)
            bent = along_x.reshape(shape) * along - 0.5 * along.square()
            return linear - 0.5 * squared + weight_N.reshape(shape) * bent

        found = logits((scale_NH * x) @ m.T, scale_NH @ m.square().T, scaled_r @ m.T)
        found[:, self.total.counts <= 0] = -torch.inf
        of_own = logits((scale_NH * x * own_m).sum(1), (scale_NH * own_m.square()).sum(1), (scaled_r * own_m).sum(1))
        found[rows, y] = of_own
        return found, possible

    def losses(self, features_NH: Tensor, labels_N: Tensor) -> Tensor:
        """The loss of each shrinkage and temperature, (γ, T), summed over the examples that can be left out."""
        table = torch.zeros(len(self.gammas), len(TEMPERATURES), dtype=torch.float64)
        for row, gamma in enumerate(self.gammas):
            logits, possible = self.left_out(features_NH, labels_N, gamma)
            for column, temperature in enumerate(TEMPERATURES):
                table[row, column] = loss(temperature * logits[possible], labels_N[possible])
        return table

    def chosen(self, losses: Tensor) -> tuple[float, float]:
        """The (γ, T) with the smallest of :meth:`losses`; where nothing could be left out, the plainest."""
        if not torch.any(losses):
            return self.gammas[-1], 1.0
        row, column = divmod(int(losses.argmin()), losses.shape[1])
        return self.gammas[row], float(TEMPERATURES[column])

    def _spread(self, gamma: float, free: float, scatter: Tensor | float, examples: float) -> Tensor:
        """The eigenvalues of Σ."""
        width = len(self.within)
        even = torch.as_tensor(scatter, dtype=torch.float64) / max(examples, 1.0) / width
        spread = (1.0 - gamma) * self.within / max(free, 1.0) + gamma * even
        return spread.clamp(min=1e-12)

    def _rotated(self, values: Tensor) -> Tensor:
        return values if self.basis is None else values @ self.basis

    def _below(self, bias_C: Tensor) -> Tensor:
        seen = self.total.counts > 0
        lowest = bias_C[seen].min() if bool(seen.any()) else bias_C.new_zeros(())
        return torch.where(seen, bias_C, lowest - UNSEEN)


def loss(logits_NC: Tensor, labels_N: Tensor) -> float:
    """Cross-entropy, summed."""
    return float(torch.nn.functional.cross_entropy(logits_NC, labels_N, reduction="sum"))


def personal_means(own: Statistics, means_CH: Tensor, kappa: float) -> Tensor:
    """A party's own class means, drawn towards everybody's as by κ examples: (S_kc + κ μ_c) / (n_kc + κ)."""
    return (own.sums + kappa * means_CH) / (own.counts + kappa)[:, None]
