"""``flexp fleet``: a server and its clients as processes of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.settings import Device, Settings, check_others, overrides, placed


def fleet(
    config: Annotated[Path, typer.Argument(help="A run's configuration, as for flexp run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the fleet; default: runs/NAME-DATE.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of each process.")] = 1,
    settings: Settings = None,
    device: Device = None,
) -> None:
    """Run a configuration as one server process and a process for each client, and go on if --out holds such a run.

    It is deterministic unless deployment.schedule says otherwise.
    """
    from rich.console import Console
    from rich.table import Table

    from flexp.cli.run import fresh
    from flexp.config import loading as files
    from flexp.report import formats
    from flexp.run.fleet import Fleet, as_begun
    from flexp.run.settle import settle

    said = overrides(settings, **placed(device))
    check_others(config, said)
    table = files.overridden(config, said).get("deployment", {})
    asked = files.load(config, said)
    found = settle(asked if out is None else as_begun(asked, out))
    for note in found.federation.remarks:
        typer.echo(f"flexp fleet: {note}")
    made = Fleet(
        found,
        out or fresh(found.config.name),
        threads=threads,
        say=lambda line: typer.echo(f"flexp fleet: {line}"),
        **table,
    )
    made.run()
    metric = found.federation.task.metric
    examples = {client.name: len(client.test) for client in found.federation.clients}
    shown = Table("client", "cut", "steps", "test examples", f"{formats.inside(metric)} before → after", "majority")
    for row in made.results():
        first, last = row["first"] or {}, row["last"] or {}
        shown.add_row(
            row["name"],
            str(row["cut"]),
            str(row["steps"]),
            str(examples[row["name"]]),
            formats.pair(first.get(metric), last.get(metric), metric),
            formats.score(last.get("majority"), metric),
        )
    Console().print(shown)
    typer.echo(f"Saved in {made.out}")


COMMANDS = {"fleet": fleet}
