"""What commands say to reach a running server as a client whose folder is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flexp.links.base import Link

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="grpc://HOST:PORT",
        help="Of what flexp client leaves (or a run): a running flexp server has the middle; grpcs:// means TLS.",
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="FLEXP_TOKEN", help="The client's token, if the server asks for one."),
]
Ca = Annotated[Path | None, typer.Option("--ca", help="TLS: the certificate that the server's is signed with (PEM).")]
Cert = Annotated[Path | None, typer.Option("--cert", help="Mutual TLS: this client's certificate (PEM).")]
Key = Annotated[Path | None, typer.Option("--key", help="Mutual TLS: the key of --cert (PEM).")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plaintext to other machines.")]


def reaching(
    server: str | None,
    token: str | None = None,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
) -> Callable[[str], Link] | None:
    """What gives a link of the client that is named; ``None`` without a server."""
    if server is None:
        return None
    from flexp.links.grpc import connect

    url = server if "://" in server else f"grpc://{server}"

    def reach(name: str) -> Link:
        return connect(url, name, token=token, ca=ca, certificate=cert, key=key, insecure=insecure)

    return reach
