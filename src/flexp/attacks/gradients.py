"""Gradients inverted: the label whose gradient in the public tail is most alike to the one that came.

What a server gets of a step's loss is ∂task/∂h, and it knows h, the blocks of the tail as everybody has them, and the
classifier as it was drawn (from the run's seed). Deep leakage from gradients (Zhu et al., 2019, arXiv 1906.08935) seeks
an input whose gradient fits; here only the label is unknown, so all of them can be tried, and it is bounded: as many
backwards as there are classes. Blocks in the tail do not hinder it, but the tail's own training does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.models.stage import Stage


def inverted(stage: Stage, first: int, h_BTH: Tensor, grad_BTH: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The label that is read for each example, (B,).

    Args:
        stage: the whole pretrained model.
        first: e, the first block of the tail.
        h_BTH: what the server sent down; ``grad_BTH``: what came back.
        batch: the examples; of the labels only their shape is looked at.
    """
    stage.model.eval()
    h_BTH, grad_BTH = (value.detach().to(stage.model.device, stage.model.dtype) for value in (h_BTH, grad_BTH))
    with torch.no_grad():
        _, plan = stage.plan({key: value for key, value in batch.items() if key != "labels"})
    alike = []
    for label in range(int(stage.model.config.num_labels)):
        with torch.enable_grad():
            z_BTH = h_BTH.clone().requires_grad_()
            tried = {**batch, "labels": torch.full_like(batch["labels"], label)}
            loss = stage.finish(stage.run(z_BTH, plan, first, stage.anatomy.blocks), tried, plan).loss
            made_BTH = torch.autograd.grad(loss, z_BTH)[0]
        alike.append(F.cosine_similarity(made_BTH.flatten(1).float(), grad_BTH.flatten(1).float()))
    return torch.stack(alike).argmax(0).cpu()
