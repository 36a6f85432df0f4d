"""Fetching the trained shared weights of a block, in answers of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from flexp.errors import LinkError
from flexp.links.base import Link, ask
from flexp.links.messages import FetchReply, FetchRequest

MOST = 16 << 20
"""Bytes of tensors in one answer."""


def pieces(link: Link, block: int) -> Iterator[FetchReply]:
    """The answers that together hold the block; their versions may differ where training goes on.

    Raises:
        LinkError: the server does not give it.
    """
    names: set[str] = set()
    while True:
        reply = ask(link, FetchRequest(block, len(names), MOST))
        if len(names) < reply.total and not reply.weights.keys() - names:
            raise LinkError(f"the server gives {len(names)} of the {reply.total} weights of block {block}")
        names |= reply.weights.keys()
        yield reply
        if len(names) >= reply.total:
            return
