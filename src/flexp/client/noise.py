"""Noise on what is sent, and what it guarantees: little, unless it is so large that nothing is learnt.

Every token's activation is clipped to a norm C, and gaussian noise of norm about ρ·C is added (σ = ρ·C ÷ √H). It is
drawn from a key of the client's and the text itself, so a text is covered by the same noise whenever it is sent: fresh
noise would average out over epochs. The price is that *differences* between two times are exact, as far as the head
has moved in between; no ε holds for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flexp import gaussian
from flexp.config import RunConfig
from flexp.data.types import Federation
from flexp.gaussian import DELTA


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

    def fresh(self, z_NH: Tensor, said: bytes = b"") -> Tensor:
        """z covered with other noise, as an attacker makes it of public text; what is ``said`` with a key gives rows of
        its own."""
        clipped = self.clipped(z_NH)
        return clipped + self._sigma(clipped) * gaussian.drawn(clipped.shape, self.key, said).to(clipped)

    def _of(self, ids_T: Tensor, z_TH: Tensor) -> Tensor:
        noise = gaussian.drawn(z_TH.shape, self.key, ids_T.cpu().numpy().astype("<i8").tobytes())
        return (self._sigma(z_TH) * noise).to(z_TH)

    def _sigma(self, z: Tensor) -> float:
        assert self.clip is not None
        return self.ratio * self.clip / math.sqrt(z.shape[-1])


def epsilon(ratio: float, hidden: int, tokens: int = 1) -> float:
    """ε of one release of ``tokens`` activations, any of which may be replaced: the sensitivity is 2C for each.

    Args:
        ratio: ρ.
    """
    return gaussian.epsilon(2 * math.sqrt(hidden * tokens) / ratio)


def ledger(config: RunConfig, federation: Federation, hidden: int) -> dict[str, float | None]:
    """What ``[privacy]`` guarantees: ε at ``delta`` of one ``activation`` and of the longest ``text``, each sent once;
    of a text in a whole ``run``, ``None``: there is none, since each epoch covers it with the same noise and heads move
    in between; what it would be with ``fresh`` noise in each of ``epochs``; and of a label (``labels``), over the run.
    """
    found: dict[str, float | None] = {}
    ratio, labels = config.privacy.noise, config.privacy.label_epsilon
    if ratio:
        train = [client.train for client in federation.clients if client.train]
        seen = config.train.total_steps * config.train.batch_size
        epochs = max((math.ceil(seen / len(each)) for each in train), default=1)
        tokens = max((len(example.get("input_ids", ())) for each in train for example in each), default=1)
        tokens = 1 if config.privacy.pool else tokens  # of a text one activation is sent
        found = {"delta": DELTA, "activation": epsilon(ratio, hidden), "tokens": tokens,
                 "text": epsilon(ratio, hidden, tokens), "run": None, "epochs": epochs,
                 "fresh": epsilon(ratio, hidden, tokens * epochs)}  # fmt: skip
    return found if labels is None else found | {"labels": labels}


def told(found: Mapping[str, float | None]) -> str:
    """A :func:`ledger` in words."""
    said, known = [], {key: value for key, value in found.items() if value is not None}
    if "text" in found:
        tokens = "{activation:.3g} for one activation and {text:.3g} for a text of {tokens} of them"
        said.append((
            f"ε = {tokens if known['tokens'] > 1 else '{text:.3g} for a text'}, sent once (δ = {{delta:g}}), and none "
            "for a run: heads move between {epochs} epochs under the same noise (fresh noise would give "
            "{fresh:.3g}); more than about 10 is no guarantee"
        ).format(**known))  # fmt: skip
    if "shared" in found:
        said.append(
            "ε = {shared:.3g} for all steps of a client, towards others who see the shared blocks (δ = "
            "{delta:g})".format(**known)
        )
    if "labels" in found:
        said.append("ε = {labels:g} for each label, over the whole run".format(**known))
    return "; ".join(said)
