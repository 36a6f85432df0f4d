"""``flexp status``: how a server and its clients are doing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.texts import plain


def status(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of flexp server; grpcs://HOST:PORT means TLS.")],
    token: Annotated[
        str | None, typer.Option(envvar="FLEXP_TOKEN", help="The operator's, if the server has tokens.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="TLS: the certificate (PEM) that the server's is signed with.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plaintext beyond this machine.")] = False,
    json: Annotated[bool, typer.Option("--json", help="All facts as JSON.")] = False,
) -> None:
    """Show a server's clients: their cuts, steps, losses, scores and bytes."""
    import json as form

    from flexp.links.grpc.status import ask_status
    from flexp.report import formats

    facts = ask_status(server if "://" in server else f"grpc://{server}", token=token, ca=ca, insecure=insecure)
    if json:
        typer.echo(form.dumps(facts, indent=2))  # which escapes all that is not ASCII
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    start, stop = facts["blocks"]
    said = (
        f"FlexP {facts['version']}, blocks [{start}, {stop}), {facts['tuning']} tuning, "
        f"{facts['updates']} updates, {facts['in_flight']} exchanges in flight, {facts['versions']} versions held, "
        f"up for {formats.seconds(facts['seconds'])}"
    )
    typer.echo(plain(said))
    if facts["run"] is not None:
        newest = facts["snapshots"][-1] if facts["snapshots"] else "none yet"
        typer.echo(plain(f"run {facts['run']}, newest snapshot: {newest}"))
    table = Table("client", "here", "cut", "steps", "applied", "loss", "score", "up", "down")
    for name, own in facts["clients"].items():
        table.add_row(
            Text(plain(name)),
            "aside" if own["aside"] else "yes" if own["connected"] else "no",
            *(Text(plain(said)) for said in (own["cut"] or "–", own.get("steps", "–"), own["applied_steps"])),
            *(f"{own[key]:.4g}" if own.get(key) is not None else "–" for key in ("loss", "score")),
            *(formats.size(own[key]) if own.get(key) is not None else "–" for key in ("bytes_up", "bytes_down")),
        )
    Console(width=None if Console().is_terminal else 120).print(table)


COMMANDS = {"status": status}
