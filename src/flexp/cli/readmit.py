"""``flexp readmit``: let a client in again that the server has put aside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def readmit(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Or grpcs://HOST:PORT.")],
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="Its name.")],
    token: Annotated[
        str | None, typer.Option(envvar="FLEXP_TOKEN", help="Of the name 'operator', if the server has tokens.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="TLS: the certificate (PEM) that the server's is signed with.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plaintext beyond this machine.")] = False,
) -> None:
    """Let a client in again that kept sending what cannot be used."""
    from flexp.links.grpc.status import ask_readmit

    ask_readmit(server if "://" in server else f"grpc://{server}", client, token=token, ca=ca, insecure=insecure)
    typer.echo(f"{client} may join again")


COMMANDS = {"readmit": readmit}
