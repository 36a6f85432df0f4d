"""``flexp status`` and ``flexp readmit``: how a server and its clients are doing, and who may come again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from flexp.cli.reaching import Cert, Insecure, Key, Pem, grouped, url_of
from flexp.cli.settings import console
from flexp.errors import plain


@dataclass(frozen=True)
class Operator:
    """How its operator and a server know each other."""

    token: Annotated[
        str | None, typer.Option(envvar="FLEXP_TOKEN", help="Of the name 'operator', if the server has tokens.")
    ] = None
    ca: Pem = None
    cert: Cert = None
    key: Key = None
    insecure: Insecure = False


OPERATOR = Operator()


@grouped
def status(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of flexp server; grpcs://HOST:PORT means TLS.")],
    operator: Operator = OPERATOR,
    json: Annotated[bool, typer.Option("--json", help="All facts as JSON.")] = False,
) -> None:
    """Show a server's clients: their cuts, steps, losses, scores and bytes."""
    import json as form

    from flexp.links.grpc.status import ask_status
    from flexp.report import formats

    facts = ask_status(url_of(server), **asdict(operator))
    if json:
        typer.echo(form.dumps(facts, indent=2))  # which escapes all that is not ASCII
        return

    from rich.table import Table
    from rich.text import Text

    start, stop = facts["blocks"]
    said = (
        f"FlexP {facts['version']}, blocks [{start}, {stop}), {facts['tuning']} tuning, "
        f"{facts['updates']} updates, {facts['in_flight']} exchanges in flight, {facts['versions']} versions held, "
        f"up for {formats.seconds(facts['seconds'])}"
    )
    typer.echo(plain(said))
    for blocks, own in facts["servers"].items():
        typer.echo(
            plain(f"of them {blocks} further on: {own['updates']:.0f} updates, {own['in_flight']:.0f} exchanges in "
                  f"flight, {own['compute_seconds']:.0f} s of computing, when it was heard last")
        )  # fmt: skip
    if facts["run"] is not None:
        newest = facts["snapshots"][-1] if facts["snapshots"] else "none yet"
        typer.echo(plain(f"run {facts['run']}, newest snapshot: {newest}"))
    counts = ["applied_steps"]
    if any(own["skipped_steps"] for own in facts["clients"].values()):
        counts.append("skipped_steps")
    heads = [count.removesuffix("_steps") for count in counts]
    table = Table("client", "here", "cut", "steps", *heads, "loss", "score", "up", "down")
    for name, own in facts["clients"].items():
        table.add_row(
            Text(plain(name)),
            "aside" if own["aside"] else "yes" if own["connected"] else "no",
            *(Text(plain(said)) for said in (own["cut"] or "–", own.get("steps", "–"))),
            *(Text(plain(own[key])) for key in counts),
            *(f"{own[key]:.4g}" if own.get(key) is not None else "–" for key in ("loss", "score")),
            *(formats.size(own[key]) if own.get(key) is not None else "–" for key in ("bytes_up", "bytes_down")),
        )
    console().print(table)


@grouped
def readmit(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Or grpcs://HOST:PORT.")],
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="Its name.")],
    operator: Operator = OPERATOR,
) -> None:
    """Let a client in again that kept sending what cannot be used."""
    from flexp.links.grpc.status import ask_readmit

    ask_readmit(url_of(server), client, **asdict(operator))
    typer.echo(f"{client} may join again")


COMMANDS = {"status": status, "readmit": readmit}
