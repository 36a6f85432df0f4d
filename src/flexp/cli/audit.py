"""``flexp audit``: what the server can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexp.cli.settings import Settings
from flexp.errors import ConfigError

if TYPE_CHECKING:
    from flexp.methods import Method


def audit(
    place: Annotated[Path, typer.Argument(help="A run's configuration (TOML), its folder, or what flexp client left.")],
    settings: Settings = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are watched, from the beginning or going on.")] = 1,
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a run's folder: this client's trained head alone.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Of a trained head: what it tells of these texts; default: its own data."),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public text that the attacker learns from, one a line.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Slow attacks, too, and more public text.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--attack", metavar="NAME", help="Only these attacks on tokens, slow ones too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="PAGE.html", help="Write a page; it shows private texts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, without texts.")] = False,
) -> None:
    """Attack what clients would send, as a curious server could: texts and labels that it reads.

    Everything stays in this process; of a run's or a client's folder nothing changes.
    """
    from flexp.audit.page import render, tables
    from flexp.files import write_text
    from flexp.run.folder import is_client

    if place.is_dir() and settings:
        raise ConfigError("--set goes with a configuration: a folder is audited as it is")
    kept: Any = {"public": public, "full": full, "only": only or ()}
    if is_client(place) or client is not None or data is not None:
        if rounds != 1:
            raise ConfigError("--rounds is for runs whose server is here: of a client's head nothing is trained")
        from flexp.export.heads import audit_head

        found = audit_head(place, client, data, **kept)
    else:
        from flexp.audit import audit as attack

        found = attack(_method(place, settings), rounds=rounds, **kept)
    if out is not None:
        write_text(out, render(found))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    from rich.console import Console

    console = Console()
    for made in tables(found):
        console.print(made.terminal(made.headers))
    typer.echo(f"The server can read: {found.line}.")
    typer.echo("Better attacks may read more: docs/security.md.")
    if out is not None:
        typer.echo(f"Page: {out} (with private texts)")


def _method(place: Path, settings: Settings) -> Method:
    """Of a run's folder, or as a configuration begins."""
    if place.is_dir():
        from flexp.export.saved import open_run

        return open_run(place).method
    from flexp.config.loading import load
    from flexp.run.settle import build_world

    world = build_world(load(place, settings or ()))
    return world.method(world)


COMMANDS = {"audit": audit}
