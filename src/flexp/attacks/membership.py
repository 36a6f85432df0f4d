"""Membership: was a text among those that the shared blocks were trained on?

After Yeom et al. (2018, arXiv 1709.01604): what was trained on is fitted better. Whoever has the shared weights (the
server; a client that pulls them) has the public ends as well, so of a language model it knows each text's loss before
and after. Of other tasks it has no head; what it sees is how far a text's activations have moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.attacks.labels import area
from flexp.attacks.public import BATCH, padded, pooled
from flexp.models.stage import Stage


def membership(
    public: Stage, shared: Stage, members: Sequence[Sequence[int]], others: Sequence[Sequence[int]], *, words: bool
) -> float:
    """The area under the curve: 0.5 where nothing is told, 1 where all is. Turned around where that reads more.

    Args:
        public: the whole pretrained model; ``shared``: the blocks that were trained.
        members, others: token ids of texts that were trained on, and of such that were not.
        words: the model predicts tokens: look at the loss.
    """
    gained_NK = torch.cat([
        _gained(public, shared, texts[start : start + BATCH], words=words)
        for texts in (members, others) for start in range(0, len(texts), BATCH)
    ])  # fmt: skip
    if words:
        score_N = gained_NK.squeeze(1)
    else:
        centred_NH = gained_NK - gained_NK.mean(0)
        score_N = (centred_NH @ torch.linalg.svd(centred_NH, full_matrices=False)[2][0]).abs()
    found = area(score_N[: len(members)], score_N[len(members) :])
    return max(found, 1 - found)


def _gained(public: Stage, shared: Stage, texts: Sequence[Sequence[int]], *, words: bool) -> Tensor:
    """Of each text: by how much its loss has fallen, (B, 1), or where its mean activation has moved, (B, H)."""
    first, stop = min(shared.part.blocks), max(shared.part.blocks) + 1
    ids_BT, mask_BT = padded(texts, public.model.device)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    ends = []
    with torch.no_grad():
        for stage in (public, shared):
            stage.model.eval()
        hidden_BTH, plan = public.plan(inputs)
        base_BTH = public.run(hidden_BTH, plan, 0, first)
        there_BTH, mask_there_BT = base_BTH.to(shared.model.device), mask_BT.to(shared.model.device)
        own = shared.plan_without_inputs(there_BTH, mask_there_BT, None)
        trained_BTH = shared.run(there_BTH, own, first, stop).to(base_BTH.device)
        for h_BTH in (public.run(base_BTH, plan, first, stop), trained_BTH):
            if not words:
                ends.append(pooled(h_BTH.float(), mask_BT.bool()).cpu())
                continue
            logits = public.finish(public.run(h_BTH, plan, stop, public.anatomy.blocks), inputs, plan).logits
            lost_BT = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids_BT[:, 1:], reduction="none")
            ends.append(pooled(lost_BT.unsqueeze(-1), mask_BT[:, 1:].bool()).cpu())
    before, after = ends
    return before - after
