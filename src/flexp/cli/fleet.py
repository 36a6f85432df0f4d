"""``flexp fleet``: a server and its clients as processes of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.settings import Settings


def fleet(
    config: Annotated[Path, typer.Argument(help="A run's configuration, as for flexp run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the fleet; default: runs/NAME-DATE.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of each process.")] = 1,
    settings: Settings = None,
) -> None:
    """Run a configuration as one server process and a process for each client, and go on if --out holds such a run.

    It is deterministic unless deployment.schedule says otherwise.
    """
    from rich.console import Console
    from rich.table import Table

    from flexp.cli.run import fresh
    from flexp.config import loading as files
    from flexp.run.fleet import Fleet
    from flexp.run.settle import settle

    found = settle(files.load(config, settings or ()))
    for note in found.federation.notes:
        typer.echo(f"flexp fleet: {note}")
    table = files.overridden(config, settings or ()).get("deployment", {})
    made = Fleet(
        found,
        out or fresh(found.config.name),
        schedule=table.get("schedule", "deterministic"),
        save_every=table.get("save_every", 10),
        threads=threads,
        say=lambda line: typer.echo(f"flexp fleet: {line}"),
    )
    made.run()
    shown = Table("client", "cut", "steps", "before", "after")
    for row in made.results():
        before, after = (
            (row[when] or {}).get("accuracy", (row[when] or {}).get("perplexity")) for when in ("first", "last")
        )
        shown.add_row(row["name"], str(row["cut"]), str(row["steps"]), f"{before:.4g}", f"{after:.4g}")
    Console().print(shown)
    typer.echo(f"Saved in {made.out}")


COMMANDS = {"fleet": fleet}
