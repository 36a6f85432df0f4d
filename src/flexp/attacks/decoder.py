"""A small network that is trained to read one activation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.attacks.base import CHUNK, Attack, Centre, Public, Sent
from flexp.rng import CPU, seed_here, undisturbed

STATE = "decoder."
OTHERS = 2048
"""Tokens that a batch is told from, besides its own."""


class Decoder(Attack):
    """A network with two hidden layers from z to the embedding of the token, trained on public text; one that has
    learnt goes on from its weights."""

    name = "decoder"
    about = "a small network, trained on public text"
    slow, causal = True, False
    steps, batch, width = 1500, 512, 1024

    def __init__(self) -> None:
        self._net: nn.Sequential | None = None

    @property
    def learnt(self) -> bool:
        """Whether it has weights to go on from."""
        return self._net is not None

    def state(self) -> dict[str, Tensor]:
        """Its weights, for :meth:`load`; nothing before it has learnt."""
        return {} if self._net is None else {f"{STATE}{name}": value for name, value in self._net.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may stand among other things."""
        own = {name.removeprefix(STATE): value for name, value in state.items() if name.startswith(STATE)}
        self._net = None
        if own:
            first, *_, last = (value for value in own.values() if value.dim() == 2)
            self._net = self._made(first.shape[1], len(last))
            self._net.load_state_dict(own)

    def learn(self, public: Public) -> None:
        """See :class:`Attack`."""
        self._centre, self._embeddings = Centre(public.sent), public.embeddings
        z_NH = self._centre(public.sent)
        self._scale = z_NH.std()
        # Only tokens that public text has can be learnt.
        known, target_N = torch.unique(public.ids_N, return_inverse=True)
        known_KE = self._embeddings[known]
        with undisturbed(CPU):
            seed_here(0)
            self._net = self._net or self._made(z_NH.shape[1], self._embeddings.shape[1])
            optimiser = torch.optim.AdamW(self._net.parameters(), lr=1e-3)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
            for _ in range(self.steps):
                rows = torch.randint(len(target_N), (self.batch,))
                told_BE = self._net(z_NH[rows] / self._scale)
                optimiser.zero_grad()
                torch.autograd.backward(sampled_loss(told_BE, target_N[rows], known_KE))
                optimiser.step()
                falling.step()

    def guess(self, sent: Sent) -> Tensor:
        """See :class:`Attack`."""
        assert self._net is not None, "it learns first"
        with torch.no_grad():
            return torch.cat(
                [
                    (self._net(each / self._scale) @ self._embeddings.T).argmax(1)
                    for each in torch.split(self._centre(sent), CHUNK)
                ]
            )

    def _made(self, hidden: int, embedding: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(hidden, self.width), nn.GELU(), nn.LayerNorm(self.width),
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, embedding),
        )  # fmt: skip


def sampled_loss(told_BE: Tensor, target_B: Tensor, known_KE: Tensor) -> Tensor:
    """The cross-entropy of the right one among embeddings of tokens: those of the batch and :data:`OTHERS` by lot,
    since scoring a whole vocabulary takes most of the time of learning."""
    there, right_B = torch.unique(target_B, return_inverse=True)
    others = torch.randint(len(known_KE), (OTHERS,))
    tried = torch.cat([there, others[~torch.isin(others, there)]])
    return F.cross_entropy(told_BE @ known_KE[tried].T, right_B)
