"""A linear map from activations to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from flexp.attacks.base import CHUNK, RIDGES, Attack, Centre, Public, Sent

CANDIDATES = 64
"""Tokens that prefix search tries at every place."""


class Linear(Attack):
    """One linear map from z to the embedding of its token in closed form (ridge regression, whose penalty is chosen on
    public texts held back), then the nearest embedding of the whole vocabulary."""

    name = "linear"
    about = "one linear map to the table of embeddings, in closed form"
    slow, causal = False, False

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre, self._embeddings = Centre(public.sent), public.embeddings
        z_NH, e_NH = self._centre(public.sent), self._embeddings[public.ids_N]
        self._mean = e_NH.mean(0)
        held_N = public.sent.texts_N % 10 == 0
        gram, cross = z_NH[~held_N].T @ z_NH[~held_N], z_NH[~held_N].T @ (e_NH[~held_N] - self._mean)
        eye = torch.eye(len(gram)) * gram.diagonal().mean()
        maps = [torch.linalg.solve(gram + ridge * eye, cross) for ridge in RIDGES]
        some, truth = z_NH[held_N][:CHUNK], public.ids_N[held_N][:CHUNK]
        self._map = max(maps, key=lambda each: int((self._nearest(some @ each) == truth).sum()))

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        return torch.cat([self._nearest(each @ self._map) for each in torch.split(self._centre(sent), CHUNK)])

    def candidates(self, sent: Sent) -> Tensor:
        """The best :data:`CANDIDATES` for each activation, (N, C)."""
        most = min(CANDIDATES, len(self._embeddings))
        rows = torch.split(self._centre(sent) @ self._map, CHUNK)
        return torch.cat([self._closeness(each).topk(most).indices for each in rows])

    def _nearest(self, told_NE: Tensor) -> Tensor:
        return self._closeness(told_NE).argmax(1)

    def _closeness(self, told_NE: Tensor) -> Tensor:
        return (told_NE + self._mean) @ self._embeddings.T - self._embeddings.square().sum(1) / 2
