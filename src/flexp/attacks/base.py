"""What attacks on tokens have in common: what was sent, what everybody knows, and how an attack is asked.

A server that follows the protocol and looks at what it is sent knows the pretrained model, its tokenizer, the cut, and
some public text, which it runs through the pretrained head itself. An attack learns from that (:meth:`Attack.learn`)
and guesses the token behind every activation (:meth:`Attack.guess`). To add one: a file of this folder with a class
that has a line ``name = "…"``, in the lists of :mod:`flexp.attacks.tokens`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from flexp.models.packed import table_of
from flexp.models.stage import Stage

CHUNK = 512
"""Tokens that are compared with the whole vocabulary at once."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties, as shares of the mean variance of z."""


@dataclass(frozen=True)
class Sent:
    """Activations of one depth, one row a token of some texts, text by text; padding never counts.

    Attributes:
        z_NH: what went up, (N, H).
        positions_N: where in its text the token stands.
        texts_N: in which text.
    """

    z_NH: Tensor
    positions_N: Tensor
    texts_N: Tensor

    def __len__(self) -> int:
        return len(self.positions_N)

    @classmethod
    def of(cls, hiddens: Sequence[Tensor], masks: Sequence[Tensor]) -> Sent:
        """Of batches (B, T, H) with their masks (B, T)."""
        z, positions, texts, before = [], [], [], 0
        for hidden_BTH, mask_BT in zip(hiddens, masks, strict=True):
            z.append(hidden_BTH[mask_BT].float())
            positions.append((mask_BT.cumsum(1) - 1)[mask_BT])
            texts.append(torch.arange(before, before + len(mask_BT))[:, None].expand_as(mask_BT)[mask_BT])
            before += len(mask_BT)
        return cls(torch.cat(z), torch.cat(positions), torch.cat(texts))

    def as_one(self, cover: Callable[[Tensor], Tensor] = lambda means_UH: means_UH) -> Sent:
        """With the mean of its text, which ``cover`` changes, in every token's place: what is sent of pooled texts."""
        means_UH, at_N = means(self)
        return replace(self, z_NH=cover(means_UH)[at_N])


@dataclass(frozen=True)
class Public:
    """What everybody knows.

    Attributes:
        stage: the pretrained model, or its ends and its first blocks.
        depth: after how many blocks the activations are taken.
        sent: what the pretrained head makes of public text, and ``ids_N`` which tokens those were.
        apart: the same before texts were pooled; ``None``: they were not, or nobody knows.
    """

    stage: Stage
    depth: int
    sent: Sent
    ids_N: Tensor
    apart: Sent | None = None

    @property
    def embeddings(self) -> Tensor:
        """The model's table of tokens."""
        return table_of(self.stage.model.get_input_embeddings()).float().cpu()


class Attack(ABC):
    """A way to read tokens. ``slow``: for a full audit only. ``causal``: works on decoders alone."""

    name: ClassVar[str]
    about: ClassVar[str]
    slow: ClassVar[bool]
    causal: ClassVar[bool]

    @abstractmethod
    def learn(self, public: Public) -> None:
        """From what the pretrained head sends for public text."""

    @abstractmethod
    def guess(self, sent: Sent) -> Tensor:
        """The token behind each activation, (N,)."""

    def read(self, sent: Sent, ids_N: Tensor) -> Tensor:
        """The guesses as they are compared with the truth, ``ids_N``."""
        return self.guess(sent)


def means(sent: Sent) -> tuple[Tensor, Tensor]:
    """The mean (U, H) of each text, and which of them each row, (N,), belongs to."""
    texts_U, at_N, counts_U = torch.unique(sent.texts_N, return_inverse=True, return_counts=True)
    sums_UH = torch.zeros(len(texts_U), sent.z_NH.shape[1]).index_add_(0, at_N, sent.z_NH)
    return sums_UH / counts_U[:, None], at_N


class Centre:
    """Takes off the mean activation of a position, which says nothing of the token."""

    def __init__(self, sent: Sent) -> None:
        length = int(sent.positions_N.max()) + 1
        sums = torch.zeros(length, sent.z_NH.shape[1]).index_add_(0, sent.positions_N, sent.z_NH)
        counts = sent.positions_N.bincount(minlength=length)[:, None]
        self._means = torch.where(counts < 8, sent.z_NH.mean(0), sums / counts.clamp_min(1))

    def __call__(self, sent: Sent) -> Tensor:
        return sent.z_NH - self._means[sent.positions_N.clamp_max(len(self._means) - 1)]
