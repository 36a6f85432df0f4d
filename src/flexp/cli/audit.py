"""``flexp audit``: what the server can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.settings import Settings
from flexp.errors import ConfigError


def audit(
    place: Annotated[Path, typer.Argument(help="A run's configuration (TOML), or the folder of a run.")],
    settings: Settings = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that are watched, from the beginning or going on.")] = 1,
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

    Everything stays in this process; of a run's folder nothing changes.
    """
    from flexp.audit import audit as attack
    from flexp.audit.page import render, tables
    from flexp.config.loading import load
    from flexp.files import write_text
    from flexp.methods import Method
    from flexp.run.settle import build_world

    if place.is_dir():
        if settings:
            raise ConfigError("--set goes with a configuration: a run's folder is audited as it is")
        from flexp.export.saved import open_run

        method: Method = open_run(place).method
    else:
        world = build_world(load(place, settings or ()))
        method = world.method(world)
    found = attack(method, rounds=rounds, public=public, full=full, only=only or ())
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


COMMANDS = {"audit": audit}
