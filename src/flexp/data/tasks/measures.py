"""From logits to losses and hits, example by example. Pure functions; float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.data.tasks.text import IGNORED
from flexp.data.types import Tally


def class_tally(logits_BC: Tensor, labels_B: Tensor) -> Tally:
    """Cross-entropy and arg max of a classifier."""
    logits_BC = logits_BC.float()
    labels_B = labels_B.to(logits_BC.device)
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    return Tally(
        loss=loss_B.tolist(),
        items=[1] * len(labels_B),
        correct=(logits_BC.argmax(-1) == labels_B).tolist(),
        targets=labels_B.tolist(),
    )


def token_tally(logits_BTV: Tensor, labels_BT: Tensor) -> Tally:
    """Next-token cross-entropy, summed over each example's labelled tokens. ``labels`` are not shifted."""
    labels_BS = labels_BT[:, 1:].to(logits_BTV.device)
    losses, items = [], []
    for logits_TV, labels_S in zip(logits_BTV, labels_BS, strict=True):  # one by one: float32 of a batch is large
        kept = labels_S != IGNORED
        losses.append(F.cross_entropy(logits_TV[:-1][kept].float(), labels_S[kept], reduction="sum"))
        items.append(kept.sum())
    return Tally(loss=torch.stack(losses).tolist(), items=torch.stack(items).tolist())


def deciding_logits(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The logits, shape (B, V), from which each example's only labelled token is predicted."""
    position_B = (labels_BT != IGNORED).int().argmax(-1).to(logits_BTV.device) - 1
    return logits_BTV[torch.arange(len(position_B), device=logits_BTV.device), position_B].float()
