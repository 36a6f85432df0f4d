"""Gradients inverted: the label, and the tokens, whose gradient in the public model is most alike to the one that came.

What a server gets of a step's loss is ∂task/∂h, and it knows h, the blocks of the tail as everybody has them, and the
classifier as it was drawn (from the run's seed). Deep leakage from gradients (Zhu et al., 2019, arXiv 1906.08935) seeks
an input whose gradient fits. Of the label all values can be tried, as many backwards as there are classes; blocks in
the tail do not hinder it, but the tail's own training does. Tokens are sought by optimisation, with a bounded number of
steps. Whoever has z reads them there far better: this is what gradients would tell alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexp.models.packed import table_of
from flexp.models.stage import Stage

STEPS = 200
"""Of Adam, in which tokens are sought."""


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


def words(stage: Stage, first: int, grad_BTH: Tensor, batch: Mapping[str, Any], steps: int = STEPS) -> Tensor:
    """The tokens that are read out of gradients alone, (B, T): embeddings are sought with which the public model's own
    ∂task/∂h points where the one that came does, in ``steps`` steps of Adam; then the nearest embedding of the table.

    Args:
        first: e, the first block of the tail; ``grad_BTH``: what came.
        batch: the examples, of which labels and mask are taken as known; of the token ids only their shape is.
    """
    table_VE = table_of(stage.model.get_input_embeddings())
    ids_BT = batch["input_ids"]
    drawn = torch.Generator().manual_seed(0)
    start = table_VE.std() * torch.randn(*ids_BT.shape, table_VE.shape[1], generator=drawn).to(table_VE)
    sought_BTE = (table_VE.mean(0) + start).requires_grad_()
    others = {key: value for key, value in batch.items() if key != "input_ids"}
    wanted_BN = grad_BTH.detach().to(table_VE).flatten(1)
    optimiser = torch.optim.Adam([sought_BTE], lr=float(table_VE.std()))
    stage.model.eval()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for _ in range(steps):
            told = others | {"inputs_embeds": sought_BTE}
            hidden_BTH, plan = stage.plan({key: value for key, value in told.items() if key != "labels"})
            h_BTH = stage.run(hidden_BTH, plan, 0, first)
            loss = stage.finish(stage.run(h_BTH, plan, first, stage.anatomy.blocks), told, plan).loss
            made_BTH = torch.autograd.grad(loss, h_BTH, create_graph=True)[0]
            away = (1 - F.cosine_similarity(made_BTH.flatten(1), wanted_BN)).sum()
            sought_BTE.grad = torch.autograd.grad(away, sought_BTE)[0]
            optimiser.step()
    return torch.cdist(sought_BTE.detach().flatten(0, 1), table_VE).argmin(1).view(ids_BT.shape).cpu()
