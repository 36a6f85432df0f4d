"""What ∂task/∂h tells of classes, by its direction.

After Li et al. (2022), *Label leakage and protection in two-party split learning* (arXiv 2102.08504): with a tail that
is the classifier alone, examples of one class have gradients of one direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

KNOWN = 2
"""Examples of each class whose label the attacker knows, where it knows some."""


def directions(grads: Sequence[Tensor]) -> Tensor:
    """One unit vector an example, (N, H): of its gradients summed over tokens; of batches (B, T, H)."""
    return F.normalize(torch.cat([grad_BTH.float().sum(1) for grad_BTH in grads]), dim=1)


def clustered(rows_NH: Tensor, labels_N: Tensor) -> float:
    """The share of labels that clustering alone gives, with each cluster named after the class that suits it best."""
    classes = torch.unique(labels_N, return_inverse=True)[1]
    count = int(classes.max()) + 1
    if count < 2:
        return 1.0
    _, found = kmeans2(rows_NH.double().numpy(), count, minit="++", rng=np.random.default_rng(0), missing="warn")
    table = np.zeros((count, count))
    np.add.at(table, (found, classes.numpy()), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(labels_N))


def with_known(rows_NH: Tensor, labels_N: Tensor, known: int = KNOWN) -> float | None:
    """The share of the other labels that the nearest mean gives, when ``known`` examples of each class are known;
    ``None``: no example is left over."""
    seen = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in torch.unique(labels_N):
        seen[(labels_N == label).nonzero()[:known, 0]] = True
    if bool(seen.all()):
        return None
    names = torch.unique(labels_N[seen])
    means = F.normalize(torch.stack([rows_NH[seen & (labels_N == name)].mean(0) for name in names]), dim=1)
    return float((names[(rows_NH[~seen] @ means.T).argmax(1)] == labels_N[~seen]).float().mean())


def auc(rows_NH: Tensor, labels_N: Tensor, known: int = KNOWN) -> float | None:
    """Of two classes: the area under the curve of the direction between their known examples' means, turned around
    where that reads more: who knows a few more labels would turn it."""
    names = torch.unique(labels_N)
    if len(names) != 2:
        return None
    right = labels_N == names[1]
    first = [(labels_N == name).nonzero()[:known, 0] for name in names]
    score = rows_NH @ (rows_NH[first[1]].mean(0) - rows_NH[first[0]].mean(0))
    rest = torch.ones(len(labels_N), dtype=torch.bool)
    rest[torch.cat(first)] = False
    yes, no = score[rest & right], score[rest & ~right]
    if not len(yes) or not len(no):
        return None
    found = area(yes, no)
    return max(found, 1 - found)


def area(yes_N: Tensor, no_M: Tensor) -> float:
    """Under the curve: how often a score of ``yes_N`` is above one of ``no_M``; equal ones count half."""
    return float(((yes_N[:, None] > no_M).double() + 0.5 * (yes_N[:, None] == no_M).double()).mean())
