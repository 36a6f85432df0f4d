"""A table of what the public head makes of each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.attacks.base import CHUNK, Attack, Centre, Public, Sent


class Table(Attack):
    """The nearest neighbour among the mean activations of every token of the public text."""

    name = "table"
    about = "nearest neighbour in a table of public activations"
    slow, causal = False, False

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre = Centre(public.sent)
        z_NH = self._centre(public.sent)
        self._ids, inverse = torch.unique(public.ids_N, return_inverse=True)
        means = torch.zeros(len(self._ids), z_NH.shape[1]).index_add_(0, inverse, z_NH)
        self._table = F.normalize(means / inverse.bincount()[:, None], dim=1)

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        return torch.cat(
            [self._ids[(each @ self._table.T).argmax(1)] for each in torch.split(self._centre(sent), CHUNK)]
        )
