"""``flexp token``: who may join a server, as a file of hashed tokens that a running server follows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flexp.errors import LinkError

app = typer.Typer(no_args_is_help=True, help="Issue, list, revoke and check the tokens of a server's clients.")

File = Annotated[Path, typer.Option("--file", help="What flexp server --tokens reads.")]
Client = Annotated[str, typer.Argument(metavar="CLIENT", help="Its name; 'operator' is who may ask for the status.")]
TOKENS = Path("tokens")


@app.command("issue")
def issue(
    client: Client,
    file: File = TOKENS,
    days: Annotated[float | None, typer.Option(min=0.0, help="It expires after so many. Default: never.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Replace a token that is valid.")] = False,
) -> None:
    """Make a token and print it, this once: the file has only its hash."""
    from flexp.links.grpc.tokens import issue as make

    token = make(file, client, days=days, again=again)
    typer.echo(token)
    typer.echo(
        f"{client}'s token, which is stored nowhere: hand it over safely (FLEXP_TOKEN, or flexp.connect(token=…))",
        err=True,
    )


@app.command("list")
def list_(file: File = TOKENS) -> None:
    """Show whose tokens there are, and whether they are valid."""
    from datetime import UTC, datetime

    from flexp.links.grpc.tokens import read_tokens, time_text

    now, items = datetime.now(UTC), read_tokens(file)
    width = max((len(item.client) for item in items), default=0)
    for item in items:
        state = "valid" if item.valid(now) else "revoked" if item.revoked else "expired"
        times = [
            f"{name} {time_text(time)}"
            for name, time in (("issued", item.issued), ("expires", item.expires), ("revoked", item.revoked))
            if time is not None
        ]
        typer.echo("  ".join([f"{state:7}", item.client.ljust(width), *times]))


@app.command("revoke")
def revoke(client: Client, file: File = TOKENS) -> None:
    """Make a token worthless; a running server ends the client's stream within a second or two."""
    from flexp.links.grpc.tokens import revoke as mark

    mark(file, client)
    typer.echo(f"{client}'s token is revoked")


@app.command("check")
def check(client: Client, file: File = TOKENS) -> None:
    """Say whether a token (FLEXP_TOKEN, or typed in) would be accepted as this client's."""
    from flexp.links.grpc.tokens import Tokens, check_token

    token = check_token(os.environ.get("FLEXP_TOKEN") or typer.prompt("token", hide_input=True))
    if token is None or not Tokens.read(file).accept(client, token):
        raise LinkError(f"{file}: this is no valid token of {client}")
    typer.echo(f"a valid token of {client}")


COMMANDS = {"token": app}
