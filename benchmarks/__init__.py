"""Measurements of this machine: ``python -m benchmarks NAME``, where NAME is a file of this folder.

Such a file has one function, ``measure``, whose parameters are the command's options and whose result is what the
command prints (:mod:`benchmarks.tools.command`). What several of them need is in ``benchmarks/tools``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import typer

NAMES = sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("[a-z]*.py"))


def app(names: Iterable[str] = NAMES) -> typer.Typer:
    """The command, with the benches of these ``names``; others are not imported."""
    from benchmarks.tools.command import command

    made = typer.Typer(
        no_args_is_help=True, help="Measure what splitting costs and saves on this machine, and check the baselines."
    )
    made.callback()(lambda: None)  # so that one bench alone needs its name, too
    for name in names:
        module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
        made.command(name)(command(name, module.measure))
    return made
