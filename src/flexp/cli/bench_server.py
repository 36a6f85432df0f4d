"""``flexp bench chaos``: what a server and its clients stand."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from flexp.errors import FlexpError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def chaos(
    faults: Annotated[int, typer.Option(min=1, help="In all.")] = 500,
    kills: Annotated[int, typer.Option(min=0, help="Of these: processes killed, the server among them.")] = 20,
    full_disks: Annotated[int, typer.Option(min=0, help="Of these: disks that are full for a second.")] = 5,
    steps: Annotated[int, typer.Option(min=20, help="Of each of the three clients.")] = 2000,
    rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of faults on the network, for each piece.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of all that goes wrong.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep everything there; default: a temporary folder.")] = None,
    as_json: Json = False,
) -> None:
    """Kill, cut, damage and delay while a fleet trains, and compare its weights with an undisturbed run's."""
    from flexp.bench.chaos import chaos as bench

    def say(line: str) -> None:
        typer.echo(f"flexp bench chaos: {line}", err=True)

    with tempfile.TemporaryDirectory() as spare:
        result = bench(
            out or Path(spare), faults=faults, kills=kills, full_disks=full_disks, steps=steps, rate=rate, seed=seed,
            say=say,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
    else:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(result["by_kind"].items()))
        typer.echo(f"{result['faults']} faults in {result['seconds']:.0f} s and {result['steps']} steps: {kinds}")
        typer.echo(
            f"{result['compared']} tensors compared with the undisturbed run's: {len(result['different'])} differ"
        )
    if result["different"]:
        raise FlexpError(f"the weights are not those of the undisturbed run: {', '.join(result['different'][:3])}, …")
