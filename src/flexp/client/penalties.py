"""What z tells of its tokens, as a number that a head can be trained against: ``privacy.penalty``.

*NoPeek* (Vepakomma et al., arXiv 2008.09161): the distance correlation between z and the input embeddings of its
tokens. *Adversary*: how well a small network reads the embeddings out of z, which learns along with the head, as a
server would (adversarial training; Ganin et al., arXiv 1505.07818, do it with a reversed gradient, here the reading is
bounded instead).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.rng import CPU, seed_here, undisturbed

STATE = "adversary."


class NoPeek:
    """Distance correlation, in [0, 1]."""

    def value(self, z_NH: Tensor, e_NE: Tensor, at: tuple[int, int] | None = None) -> Tensor:
        """Of activations and the embeddings of their tokens; differentiable in z. ``at``: step and exchange."""
        return distance_correlation(z_NH, e_NE)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`load` needs."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`, which may stand among other things."""


class Adversary:
    """The squared cosine between what the decoder reads and what it should, in [0, 1]; first the decoder learns.

    Args:
        seed: of its first weights.
    """

    width: ClassVar[int] = 256
    steps: ClassVar[int] = 4
    lr: ClassVar[float] = 1e-3

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._net: nn.Sequential | None = None
        self._pending: dict[str, Tensor] = {}
        self._at: tuple[int, int] | None = None  # the exchange that it learnt from last
        self._before: dict[str, Tensor] = {}  # how it was when that step began

    def value(self, z_NH: Tensor, e_NE: Tensor, at: tuple[int, int] | None = None) -> Tensor:
        """As :meth:`NoPeek.value`. A step that is done again, having been given up, finds the decoder as it was."""
        z_NH, e_NE = z_NH.float(), F.normalize(e_NE.float() - e_NE.float().mean(0), dim=1)
        net = self._made(z_NH, e_NE)
        if at is not None:
            if self._at is None or at[0] != self._at[0]:
                self._before = copy.deepcopy(self.state())
            elif at[1] <= self._at[1]:
                self._restore(self._before)
            self._at = at
        for _ in range(self.steps):
            torch.autograd.backward(1 - F.cosine_similarity(net(z_NH.detach()), e_NE).mean())
            self._optimiser.step()
            self._optimiser.zero_grad()
        for weight in net.parameters():
            weight.requires_grad_(False)
        found = F.cosine_similarity(net(z_NH), e_NE).square().mean()
        for weight in net.parameters():
            weight.requires_grad_()
        return found

    def state(self) -> dict[str, Tensor]:
        """As :meth:`NoPeek.state`."""
        if self._net is None:
            return dict(self._pending)
        found = {f"{STATE}{name}": value for name, value in self._net.state_dict().items()}
        for number, moments in self._optimiser.state_dict()["state"].items():
            found |= {f"{STATE}{number}/{name}": value for name, value in moments.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """As :meth:`NoPeek.load`."""
        self._net, self._at = None, None
        self._pending = {name: value for name, value in state.items() if name.startswith(STATE)}

    def _made(self, z_NH: Tensor, e_NE: Tensor) -> nn.Sequential:
        if self._net is None:
            with undisturbed(CPU):  # made there; torch.manual_seed would seed every accelerator's generator as well
                seed_here(self._seed % (1 << 63))
                net = nn.Sequential(nn.Linear(z_NH.shape[1], self.width), nn.GELU(), nn.LayerNorm(self.width),
                                    nn.Linear(self.width, e_NE.shape[1]))  # fmt: skip
            self._net = net.to(z_NH.device)
            self._optimiser = torch.optim.Adam(self._net.parameters(), lr=self.lr)
            if self._pending:
                self._restore(self._pending)
        return self._net

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        assert self._net is not None
        moments: dict[int, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for name, value in state.items():
            number, slash, moment = name.removeprefix(STATE).partition("/")
            if slash:
                moments.setdefault(int(number), {})[moment] = value.clone()
            else:
                weights[number] = value
        self._net.load_state_dict(weights)
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})


def distance_correlation(left_NA: Tensor, right_NB: Tensor) -> Tensor:
    """Of two sets of N vectors (Székely et al., 2007): 0 where they are independent, 1 where one is the other turned
    and scaled. Squared, as NoPeek has it."""
    left, right = _distances(left_NA), _distances(right_NB)
    both = left.square().mean() * right.square().mean()
    return (left * right).mean() / (both + 1e-24).sqrt()


def _distances(rows_NA: Tensor) -> Tensor:
    """Euclidean, with the means of rows and columns taken off."""
    rows_NA = rows_NA.float()
    squares = rows_NA.square().sum(1)
    far = (squares[:, None] + squares - 2 * rows_NA @ rows_NA.T).clamp_min(1e-6).sqrt()
    return far - far.mean(0) - far.mean(1, keepdim=True) + far.mean()
