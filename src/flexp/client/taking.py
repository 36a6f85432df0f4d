"""Taking over weights of the server: in portions, without what is here already, and looked at before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from flexp.client.exchange import check_finite
from flexp.errors import LinkError
from flexp.links.asking import FetchReply, FetchRequest, PullReply, PullRequest
from flexp.links.base import Link, ask
from flexp.models.fingerprint import tensor_fingerprint

MOST = 16 << 20
"""Bytes of an answer, but for a tensor that is larger: a server does nothing else while it sends one."""
MOST_TENSORS = 1 << 16
"""In the blocks that are asked for."""


@overload
def fetched(link: Link, request: FetchRequest, held: Mapping[str, Tensor] | None = None) -> Iterator[FetchReply]: ...
@overload
def fetched(link: Link, request: PullRequest, held: Mapping[str, Tensor] | None = None) -> Iterator[PullReply]: ...
def fetched(link: Link, request: Any, held: Mapping[str, Tensor] | None = None) -> Iterator[Any]:
    """The answers that together hold the trained shared weights that are asked for; while training goes on the versions
    of a block's differ.

    Args:
        held: tensors that are here: of those that are the server's, nothing crosses but their fingerprints, and they
            stand in the answers as if they had come.

    Raises:
        LinkError: the server does not give them, or gives something else.
    """
    held, names = held or {}, set[str]()
    known = {name: tensor_fingerprint(value) for name, value in held.items()}
    while True:
        reply = ask(link, replace(request, first=len(names), most=MOST, known=known))
        check_portion(reply)
        check_same(reply.same, held)
        reply = replace(reply, weights={**{name: held[name] for name in reply.same}, **reply.weights})
        if len(names) < reply.total and not reply.weights.keys() - names:
            raise LinkError(f"the server gives {len(names)} of the {reply.total} weights, and leaves out the others")
        names |= reply.weights.keys()
        yield reply
        if len(names) >= reply.total:
            return


def check_portion(reply: FetchReply | PullReply) -> None:
    """Refuse more weights than were asked for, or than any blocks have. Raises LinkError."""
    size = sum(value.numel() * value.element_size() for value in reply.weights.values())
    if not 0 <= reply.total <= MOST_TENSORS or (len(reply.weights) > 1 and size > MOST):
        raise LinkError(
            f"the server sends {size} bytes in {len(reply.weights)} of {reply.total} weights, expected at most {MOST} "
            f"bytes, or one tensor, and {MOST_TENSORS} in all"
        )
    for name, value in reply.weights.items():
        check_finite(f"the weight {name}", value)


def check_same(same: Sequence[str], held: Mapping[str, Tensor]) -> None:
    """Refuse a server that leaves out what the client did not say it has. Raises LinkError."""
    odd = sorted(set(same) - held.keys())
    if odd:
        raise LinkError(f"the server leaves out the weight {odd[0]}, which it was not told is here")


def check_shapes(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Refuse weights that are not among those that were asked for. Raises LinkError."""
    odd = sorted(weights.keys() - expected.keys())
    if odd:
        raise LinkError(f"the server sends the weight {odd[0]}, which nobody asked for; nothing was taken over")
    for name, value in weights.items():
        if value.shape != expected[name]:
            raise LinkError(f"the server's {name} is {tuple(value.shape)}, expected {tuple(expected[name])}")
