"""The loss of a language model, a piece of its tokens at a time, with the bits that transformers has on a processor.

transformers computes it from a copy of all logits in float32, beside which are their log-probabilities and the
gradients of both: four numbers of 4 bytes for each logit, which for 512 tokens and a vocabulary of 128,000 are a
gigabyte. Here a piece of tokens has them at a time, forwards and, computed again, backwards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from flexp.kinds import IGNORED

PIECE = 1 << 22
"""Logits of a piece, at most; fewer altogether are left to transformers."""


def give_loss(model: Any) -> None:
    """Have ``model``, if its loss is transformers' of the next token, compute it in pieces."""
    found = getattr(model, "loss_function", None)
    if isinstance(found, partial) and not (found.args or found.keywords):  # as it comes out of a pickle
        found = found.func
    if getattr(model, "loss_type", None) == "ForCausalLM" and found is ForCausalLMLoss:
        model.loss_function = IN_PIECES


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """As ``transformers.loss.loss_utils.ForCausalLMLoss``: logits (B, T, V), labels (B, T) → a number."""
    if logits.numel() <= PIECE:
        return ForCausalLMLoss(  # type: ignore[no-any-return]
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others
        )
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets_N = shift_labels.reshape(-1).to(logits.device)
    logits_NV = logits.reshape(-1, vocab_size)
    lost_N: Tensor = _EachToken.apply(logits_NV, targets_N, ignore_index)  # type: ignore[no-untyped-call]
    # Summed as cross_entropy sums: by nll_loss, which reads column 0 of what has one column, or ignores the row.
    column_N = torch.where(targets_N == ignore_index, IGNORED, 0)
    how = "mean" if num_items_in_batch is None else "sum"
    loss = F.nll_loss(-lost_N[:, None], column_N, ignore_index=IGNORED, reduction=how)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


class _InPieces:
    """:func:`next_token_loss`, of which a model takes nothing along: pickled, it is transformers' own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return next_token_loss(*args, **kwargs)

    def __copy__(self) -> _InPieces:
        return self

    def __deepcopy__(self, _: Any) -> _InPieces:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (ForCausalLMLoss,)


IN_PIECES = _InPieces()


class _EachToken(torch.autograd.Function):
    """−log p of every token's target (N,), in float32, from logits (N, V)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.ignore_index = ignore_index
        return torch.cat([_lost(logits, targets, ignore_index) for logits, targets in _pieces(logits_NV, targets_N)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated as well
            lost_N = _lost(logits_NV, targets_N, ctx.ignore_index)
            return torch.autograd.grad(lost_N, logits_NV, grads[0], create_graph=True)[0], None, None
        found_NV = torch.empty_like(logits_NV)
        for into, logits, targets, grad in _pieces(found_NV, logits_NV, targets_N, grads[0]):
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                lost = _lost(logits, targets, ctx.ignore_index)
            into.copy_(torch.autograd.grad(lost, logits, grad)[0])
        return found_NV, None, None


def _lost(logits_NV: Tensor, targets_N: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=ignore_index, reduction="none")


def _pieces(*values: Tensor) -> Any:
    """The same rows of all of ``values``, of which the first is (N, V), piece by piece."""
    rows = max(1, PIECE // values[0].shape[-1])
    return zip(*(torch.split(value, rows) for value in values), strict=True)
