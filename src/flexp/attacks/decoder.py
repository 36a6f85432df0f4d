"""A small network that is trained to read one activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.attacks.base import CHUNK, Attack, Centre, Public, Sent


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
        # Only tokens that public text has can be learnt; scoring those alone is many times as fast.
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
                told = self._net(z_NH[rows] / self._scale) @ self._embeddings[known].T
                optimiser.zero_grad()
                torch.autograd.backward(F.cross_entropy(told, target_N[rows]))
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
