"""A link that goes through gRPC although both sides are in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flexp.links.base import Link, Service, connected
from flexp.links.grpc.connecting import connect
from flexp.links.grpc.serving import serve


@contextmanager
def loopback(service: Service, client: str) -> Iterator[Link]:
    """A link for ``client`` to ``service``, in plaintext over a free port of this machine; nothing is rounded."""
    with serve(service) as serving, connected(connect(f"grpc://{serving.address}", client, codec="off")) as link:
        yield link
