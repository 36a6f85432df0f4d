"""Noise on what is sent, and what it guarantees: little, unless it is so large that nothing is learnt.

Every token's activation is clipped to a norm C, and gaussian noise of norm about ρ·C is added (σ = ρ·C ÷ √H). It is
drawn from a key of the client's and the text itself, so a text is covered by the same noise whenever it is sent: fresh
noise would average out over epochs. The price is that *differences* between two times are exact, as far as the head
has moved in between; no ε holds for them.
"""

from __future__ import annotations

import hashlib
import math

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

DELTA = 1e-5
"""δ of what is told."""


class Noise:
    """Covers activations.

    Args:
        ratio: ρ, of the noise's norm to the clipping norm.
        key: whoever knows it and a text takes the noise off.
        clip: C; ``None`` until somebody sets it.
    """

    def __init__(self, ratio: float, key: int, clip: float | None) -> None:
        self.ratio, self.key, self.clip = ratio, key, clip

    def cover(self, z_BTH: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """What is sent of z, (B, T, H), for texts of these tokens."""
        noise = [self._of(ids_T[mask_T], z_T) for ids_T, mask_T, z_T in zip(ids_BT, mask_BT, z_BTH, strict=True)]
        return self.clipped(z_BTH) + torch.stack(noise)

    def clipped(self, z_BTH: Tensor) -> Tensor:
        """z with norms of at most C."""
        assert self.clip is not None, "the clipping norm comes first"
        norm_BT1: Tensor = z_BTH.norm(dim=-1, keepdim=True)
        return z_BTH * (self.clip / norm_BT1.clamp_min(1e-12)).clamp(max=1.0)

    def fresh(self, z_NH: Tensor) -> Tensor:
        """z covered with other noise, as an attacker makes it of public text."""
        clipped, drawn = self.clipped(z_NH), torch.Generator().manual_seed(self.key)
        return clipped + self._sigma(clipped) * torch.randn(clipped.shape, generator=drawn)

    def _of(self, ids_T: Tensor, z_TH: Tensor) -> Tensor:
        words = self.key.to_bytes(8, "big") + ids_T.cpu().numpy().astype("<i8").tobytes()
        drawn = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:8], "big") >> 1)
        noise = torch.randn(z_TH.shape, generator=drawn, dtype=torch.float32)
        return (self._sigma(z_TH) * noise).to(z_TH)

    def _sigma(self, z: Tensor) -> float:
        assert self.clip is not None
        return self.ratio * self.clip / math.sqrt(z.shape[-1])


def epsilon(ratio: float, hidden: int, tokens: int = 1, delta: float = DELTA) -> float:
    """ε of one release of ``tokens`` activations, any of which may be replaced: the gaussian mechanism, analytically
    (Balle and Wang 2018, arXiv 1805.06530, theorem 8); the sensitivity is 2C for each.

    Args:
        ratio: ρ.
    """
    mu = 2 * math.sqrt(hidden * tokens) / ratio

    def over(eps: float) -> float:
        first = math.exp(log_ndtr(mu / 2 - eps / mu))
        return first - math.exp(min(eps + log_ndtr(-mu / 2 - eps / mu), 0.0)) - delta

    return 0.0 if over(0.0) <= 0 else float(brentq(over, 0.0, mu * mu / 2 + 10 * mu + 10))
