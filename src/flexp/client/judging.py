"""What a server sends is judged by what was agreed and asked, before anything is done with it.

A link has looked at every answer's head: its type, and the shapes of activations and gradients
(:mod:`flexp.links.rules`). Here are the numbers and the names. Whatever is refused leaves the client as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.links.messages import BackwardReply, FetchReply, ForwardReply, ForwardRequest, Welcome
from flexp.links.packing import Kept

MOST_TENSORS = 2048
"""That one block may have."""


def check_welcome(welcome: Welcome, blocks: int, hidden: int, pinned: int | None) -> None:
    """Refuse a server whose words do not go with this client's model, or that moves s_min.

    Args:
        pinned: the s_min that was agreed on, in the configuration or on joining first: below it nothing may be asked
            for. ``None``: the server says it.

    Raises:
        LinkError: see above.
    """
    if (welcome.blocks, welcome.hidden) != (blocks, hidden):
        raise LinkError(
            f"the server speaks of {welcome.blocks} blocks of width {welcome.hidden}, this client's model has {blocks} "
            f"of width {hidden}; load the same pretrained model on both sides"
        )
    if welcome.max_in_flight < 1 or not welcome.base_depth < blocks:
        raise LinkError(
            f"the server lets {welcome.max_in_flight} exchanges be in flight from block {welcome.base_depth} on, "
            f"expected at least one, from a block below {blocks}"
        )
    if pinned is not None and welcome.base_depth != pinned:
        raise LinkError(
            f"the server's base depth s_min is {welcome.base_depth}, and {pinned} was agreed on: what goes up to align "
            "would come out of other blocks; start the server with the same --base-depth as before and as "
            "model.base_depth says"
        )


def check_forward_reply(request: ForwardRequest, reply: ForwardReply, reads: Kept | None = None) -> None:
    """Refuse activations that are not finite or not those that were asked for, or an alignment that was not.

    Args:
        reads: the rows that were asked for; ``None``: all.

    Raises:
        LinkError: see above.
    """
    _shaped(f"the activation of exchange {request.exchange}", reply.hidden_BTH, request.hidden_BTH, reads)
    _finite(f"the activation of exchange {request.exchange}", reply.hidden_BTH)
    if reply.align is not None and (request.base_BTH is None or not abs(reply.align) < float("inf")):
        raise LinkError(
            f"the server says that exchange {request.exchange} is aligned to {reply.align}, "
            f"{'though nothing was sent for it' if request.base_BTH is None else 'expected a finite number'}"
        )


def check_backward_reply(request: ForwardRequest, reply: BackwardReply, kept: Kept | None = None) -> None:
    """Refuse gradients that are not finite, or at other activations than those that were sent.

    Args:
        kept: the tokens of them that crossed; ``None``: all.

    Raises:
        LinkError: see above.
    """
    given, sent = len(reply.inner_BTH), len(request.inner_BTH)
    if given != sent:
        raise LinkError(
            f"the server sends gradients at {given} inner activations of exchange {request.exchange}, expected {sent} "
            "as were sent"
        )
    if reply.grad_BTH is None:
        raise LinkError(f"the server sends no gradient of exchange {request.exchange}, and one was asked for")
    for value in (reply.grad_BTH, *reply.inner_BTH):
        _shaped(f"the gradient of exchange {request.exchange}", value, request.hidden_BTH, kept)
        _finite(f"the gradient of exchange {request.exchange}", value)


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size], *, all_of_them: bool) -> None:
    """Refuse weights that are not those that were asked for, or that are not finite.

    Args:
        expected: their shapes, by name.
        all_of_them: none may be missing.

    Raises:
        LinkError: see above.
    """
    odd = sorted(weights.keys() - expected.keys())
    if odd:
        raise LinkError(f"the server sends the weight {odd[0]}, which nobody asked for; nothing was taken over")
    missing = sorted(expected.keys() - weights.keys())
    if missing and all_of_them:
        raise LinkError(f"the server leaves out the weight {missing[0]}, which was asked for; nothing was taken over")
    for name, value in weights.items():
        if value.shape != expected[name]:
            raise LinkError(f"the server's {name} is {tuple(value.shape)}, expected {tuple(expected[name])}")
        _finite(f"the weight {name}", value)


def check_fetched(reply: FetchReply, block: int, most: int) -> None:
    """Refuse more of a block than was asked for, or than any block has.

    Raises:
        LinkError: see above.
    """
    size = sum(value.numel() * value.element_size() for value in reply.weights.values())
    if not 0 <= reply.total <= MOST_TENSORS or (len(reply.weights) > 1 and size > most):
        raise LinkError(
            f"the server sends {size} bytes in {len(reply.weights)} of {reply.total} weights of block {block}, "
            f"expected at most {most} bytes, or one tensor, and {MOST_TENSORS} in all"
        )
    for name, value in reply.weights.items():
        _finite(f"the weight {name} of block {block}", value)


def _shaped(what: str, value: Tensor, whole_BTH: Tensor, kept: Kept | None) -> None:
    shape = tuple(whole_BTH.shape if kept is None else (1, len(kept), whole_BTH.shape[2]))
    if tuple(value.shape) != shape:
        raise LinkError(f"{what} is {tuple(value.shape)}, expected {shape}, as was asked for")


def _finite(what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise LinkError(
            f"the server sends numbers that are not finite: {what}; its shared blocks have diverged (lower "
            "train.shared.lr or train.personal.lr, or use float32), or it is broken"
        )
