"""Opening a link from what a user says, and closing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexp.links.base import InProcessLink, Link, Service
from flexp.links.wrapping import Wrapping


@contextmanager
def connected(link: Link) -> Iterator[Link]:
    """Close ``link`` when the ``with`` block ends."""
    try:
        yield link
    finally:
        link.close()


def as_link(link: Link | str) -> Link:
    """``link``, or what a URL with the client's name in it leads to: ``grpc://clinic-a@HOST:PORT``.

    A query makes the network in between slower than it is (:func:`flexp.links.emulated.split_url`).

    Raises:
        ConfigError, LinkError: as :func:`flexp.connect`.
    """
    if not isinstance(link, str):
        return link
    from flexp.links.emulated import EmulatedLink, split_url  # these only for those who use them
    from flexp.links.grpc import connect

    address, network = split_url(link)
    far: Link = connect(address)
    return far if network is None else EmulatedLink(far, network)


@contextmanager
def kept(link: Link | str) -> Iterator[Link]:
    """:func:`as_link`, for the model that the ``with`` block makes: if that fails (the server refuses, say), a link
    that was made for it is closed, so that the next attempt finds nobody connected."""
    made = as_link(link)
    try:
        yield made
    except BaseException:
        if made is not link:
            made.close()
        raise


def server_behind(link: Link) -> Any | None:
    """The :class:`flexp.server.Server` itself, where it is in this process; ``None``: it is over a network."""
    inner = _inmost(link)
    return inner.service if isinstance(inner, InProcessLink) else None


def same_server(one: Link, other: Link) -> bool:
    """Whether two links lead to one server, as far as their addresses tell."""
    first, second = (server_behind(link) or getattr(_inmost(link), "address", None) for link in (one, other))
    return first is not None and first == second


def _inmost(link: Link) -> Link:
    while isinstance(link, Wrapping):
        link = link.inner
    return link


@contextmanager
def loopback(service: Service, client: str) -> Iterator[Link]:
    """A link for ``client`` that goes through gRPC although ``service`` is in this process: in plaintext, over a free
    port of this machine; nothing is rounded."""
    from flexp.links.grpc import connect, serve

    with serve(service) as serving, connected(connect(f"grpc://{serving.address}", client, codec="off")) as link:
        yield link
