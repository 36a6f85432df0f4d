"""Answers of language models, read at the server's last block: out of h, and out of ∂task/∂h.

h, through the public tail, gives the tokens that the model itself would say: what a client generates. Labels (an answer
that is trained on) need ∂task/∂h: with J the tail's Jacobian at h, it is Jᵀ Wᵀ(p − y) ÷ n. The server knows J, the
head's rows W, and what the tail predicts, p; so it solves for Wᵀy (least squares by conjugate gradients, Paige &
Saunders, 1982), and the nearest row of W is the token. Blocks in the tail hide nothing; its own training does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flexp.kinds import IGNORED
from flexp.models.packed import table_of
from flexp.models.stage import Stage

STEPS = 30
"""Of conjugate gradients, at most."""


def said(stage: Stage, first: int, h_BTH: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The tokens that the public tail predicts from h at every place, (B, T): what a client would generate.

    Args:
        stage: the whole pretrained model, or its ends and its last blocks.
        first: e, the first block of the tail.
        h_BTH: what the server sent down; ``batch``: for its shape and its mask.
    """
    with torch.no_grad():
        return _tail(stage, first, _placed(h_BTH, stage), batch)[1].argmax(2).cpu()


def trained(stage: Stage, first: int, h_BTH: Tensor, grad_BTH: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """The token that each place was trained to predict, (B, T), where it was.

    Args:
        grad_BTH: what came back, of a mean over all places of the batch that have a label. Of ``labels`` only where
            they are is looked at, which gradients of a norm and a head alone show as well. The others: as for
            :func:`said`.
    """
    there_BT = torch.zeros_like(batch["labels"], dtype=torch.bool, device=stage.model.device)
    there_BT[:, :-1] = batch["labels"].to(there_BT.device)[:, 1:] != IGNORED
    h_BTH = _placed(h_BTH, stage).requires_grad_()
    table_VH = table_of(stage.model.get_output_embeddings())
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        last_BTH, logits_BTV = _tail(stage, first, h_BTH, batch)
        chances_BTV = logits_BTV.detach().float().softmax(2).to(table_VH.dtype)
        expected_BTH = chances_BTV @ table_VH
        made_BTH = torch.autograd.grad(logits_BTV, last_BTH, chances_BTV, retain_graph=True)[0]
        scale = (made_BTH * expected_BTH).sum() / expected_BTH.square().sum()  # some heads multiply their logits
        sought_BTH = torch.zeros_like(last_BTH, requires_grad=True)
        back_BTH = torch.autograd.grad(last_BTH, h_BTH, sought_BTH, create_graph=True)[0]

    def along(value_BTH: Tensor) -> Tensor:
        return torch.autograd.grad(back_BTH, sought_BTH, value_BTH, retain_graph=True)[0] * there_BT[..., None]

    def behind(value_BTH: Tensor) -> Tensor:
        return torch.autograd.grad(last_BTH, h_BTH, value_BTH, retain_graph=True)[0]

    found_BTH = _least_squares(behind, along, int(there_BT.sum()) * _placed(grad_BTH, stage))
    wanted_BTH = expected_BTH - found_BTH / scale
    return (wanted_BTH @ table_VH.T - table_VH.square().sum(1) / 2).argmax(2).detach().cpu()


def pointed(stage: Stage, grad_BTH: Tensor) -> Tensor:
    """The token that each place was trained to predict, (B, T), as the head alone tells it: −∂task/∂h points to its
    row, and through a few blocks nearly so. Knows neither h nor what a step's mean is over."""
    table_VH = table_of(stage.model.get_output_embeddings())
    return (-_placed(grad_BTH, stage) @ table_VH.T).argmax(2).cpu()


def _placed(value: Tensor, stage: Stage) -> Tensor:
    return value.detach().to(stage.model.device, stage.model.dtype)


def _tail(stage: Stage, first: int, h_BTH: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What the head is given, (B, T, H), and its logits."""
    given: list[Tensor] = []
    stage.model.eval()
    hook = stage.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        told = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            _, plan = stage.plan(told)
        logits_BTV = stage.finish(stage.run(h_BTH, plan, first, stage.anatomy.blocks), told, plan).logits
    finally:
        hook.remove()
    return given[0], logits_BTV


def _least_squares(forward: Any, transposed: Any, wanted: Tensor) -> Tensor:
    """x with which ``forward(x)`` is nearest to ``wanted`` (CGLS)."""
    left, step = wanted, transposed(wanted)
    found, square = torch.zeros_like(step), float(step.square().sum())
    first = square
    for _ in range(STEPS):
        if square <= 1e-10 * first:
            break
        made = forward(step)
        size = square / float(made.square().sum())
        found, left = found + size * step, left - size * made
        down = transposed(left)
        before, square = square, float(down.square().sum())
        step = down + square / before * step
    return found
