"""``flexp join``: a client that comes after training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from flexp.errors import ConfigError


def join(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run of flexp-sfl.")],
    name: Annotated[str, typer.Option("--name", help="What the newcomer is called.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Its examples, with the run's columns; default: the client NAME of the run's own source.",
        ),
    ] = None,
    start: Annotated[
        list[str] | None,
        typer.Option(
            "--start",
            metavar="pretrained|shared|CLIENT|FILE",
            help="Where its own parts start: pretrained (default), the server's copies, clients' or published ones.",
        ),
    ] = None,
    middle: Annotated[
        Literal["shared", "pretrained"], typer.Option(help="The run's shared blocks, or none of its training.")
    ] = "shared",
    train_shared: Annotated[
        bool, typer.Option("--train-shared", help="Train the shared blocks as well; the run keeps its own.")
    ] = False,
    cut: Annotated[str | None, typer.Option("--cut", metavar="S:E", help="Default: the next of the clients'.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; default: as many as the others'.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Score after so many steps.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For instance data.train_examples=24.")
    ] = None,
    number: Annotated[
        str, typer.Option("--round", metavar="N|best|last", help="After which round of the run.")
    ] = "last",
    variable: Annotated[
        str | None, typer.Option("--passphrase-env", metavar="VARIABLE", help="Of an encrypted --start FILE.")
    ] = None,
) -> None:
    """Let a newcomer start from a run's shared blocks and train its own parts on few examples."""
    from flexp.cli.verify import parse_cut
    from flexp.export.joining import join as train
    from flexp.report import formats
    from flexp.report.metrics import read

    if variable is not None and not os.environ.get(variable):
        raise ConfigError(f"--passphrase-env {variable}: there is no such variable, or it is empty; export it first")
    summary = train(
        run,
        name,
        out,
        data=data,
        start=start or ["pretrained"],
        middle=middle,
        train_shared=train_shared,
        cut=None if cut is None else parse_cut(cut),
        steps=steps,
        every=every,
        settings=settings or (),
        which=number,
        passphrase=None if variable is None else os.environ[variable],
    )
    metric = str(summary["metric"])
    records = read(out / "metrics.jsonl")
    size = sum(record["kind"] == "step" for record in records) // max(1, int(summary["rounds"]))
    typer.echo(f"\n{'steps':>5}  {formats.inside(metric)} on its own test data")
    for record in records:
        if record["kind"] == "eval":
            typer.echo(f"{record['round'] * size:>5}  {formats.score(record['personal'][metric], metric)}")
    typer.echo(f"Saved in {out}; use it with flexp evaluate, flexp predict and flexp export")


COMMANDS = {"join": join}
