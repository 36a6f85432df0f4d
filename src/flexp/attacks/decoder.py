"""A small network that is trained to read one activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.attacks.base import CHUNK, Attack, Centre, Public, Sent

OTHERS = 2048
"""Tokens that a batch is told from, besides its own."""


class Decoder(Attack):
    """A network with two hidden layers from z to the embedding of the token, trained on public text."""

    name = "decoder"
    about = "a small network, trained on public text"
    slow, causal = True, False
    steps, batch, width = 1500, 512, 1024

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre, self._embeddings = Centre(public.sent), public.embeddings
        z_NH = self._centre(public.sent)
        self._scale = z_NH.std()
        # Only tokens that public text has can be learnt.
        known, target_N = torch.unique(public.ids_N, return_inverse=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._net = nn.Sequential(
                nn.Linear(z_NH.shape[1], self.width), nn.GELU(), nn.LayerNorm(self.width),
                nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, self._embeddings.shape[1]),
            )  # fmt: skip
            optimiser = torch.optim.AdamW(self._net.parameters(), lr=1e-3)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
            for _ in range(self.steps):
                rows = torch.randint(len(target_N), (self.batch,))
                told_BE = self._net(z_NH[rows] / self._scale)
                optimiser.zero_grad()
                torch.autograd.backward(sampled_loss(told_BE, target_N[rows], self._embeddings[known]))
                optimiser.step()
                falling.step()

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        with torch.no_grad():
            return torch.cat(
                [
                    (self._net(each / self._scale) @ self._embeddings.T).argmax(1)
                    for each in torch.split(self._centre(sent), CHUNK)
                ]
            )


def sampled_loss(told_BE: Tensor, target_B: Tensor, known_KE: Tensor) -> Tensor:
    """The cross-entropy of the right one among embeddings of tokens: those of the batch and :data:`OTHERS` by lot,
    since scoring a whole vocabulary takes most of the time of learning."""
    there, right_B = torch.unique(target_B, return_inverse=True)
    others = torch.randint(len(known_KE), (OTHERS,))
    tried = torch.cat([there, others[~torch.isin(others, there)]])
    return F.cross_entropy(told_BE @ known_KE[tried].T, right_B)
