"""``flexp compare``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexp.cli.settings import Settings, check_others, console
from flexp.errors import ConfigError

if TYPE_CHECKING:
    from flexp.comparison.config import Comparison

INCOMPLETE = 1
"""Exit code of a comparison from which runs are missing."""


def compare(
    config: Annotated[Path | None, typer.Argument(help="A run's configuration, with a table `compare` or not.")] = None,
    methods: Annotated[str | None, typer.Option(help="What to compare: methods or variants, with commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds, or which: 5, or 3,4,7.")] = None,
    trials: Annotated[int | None, typer.Option(help="Settings to try for each method.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = max(1, min(2, os.cpu_count() or 1)),
    engine: Annotated[
        str,
        typer.Option(metavar="local|ray[:ADDRESS]|dask:ADDRESS|slurm", help="Who does the runs (compare.needs)."),
    ] = "local",
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default: comparisons/NAME.")] = None,
    settings: Settings = None,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Run all with the configuration's own settings.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Only make the report of --out anew.")] = False,
) -> None:
    """Tune and run several methods on the same clients, batches and budget. Again with the same --out, it goes on."""
    from flexp.comparison.config import load

    if report_only:
        from flexp.comparison.compare import regather

        if out is None:
            raise ConfigError("say which comparison: flexp compare --report-only --out DIR")
        _show(regather(out), out)
        return
    if config is None:
        raise ConfigError("say what to compare: flexp compare CONFIG.toml")
    changes: dict[str, Any] = {"trials": trials, "tune": False if no_tune else None}
    changes["methods"] = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    changes["seeds"] = None if seeds is None else _numbers(seeds)
    check_others(config, settings or ())
    wanted = load(config, settings or (), {key: value for key, value in changes.items() if value is not None})
    folder = out or Path("comparisons") / (re.sub(r"[^\w.-]+", "-", wanted.base.name).strip(".-")[:80] or "comparison")
    if dry_run:
        _list(wanted, folder)
    else:
        _go(wanted, folder, jobs, engine)


def _go(wanted: Comparison, folder: Path, jobs: int, engine: str) -> None:
    from flexp.comparison.compare import compare as do
    from flexp.comparison.progress import Display

    try:
        with Display(wanted.base.name) as display:
            outcome = do(wanted, folder, jobs, display, engine)
    except KeyboardInterrupt:
        typer.echo(f"go on with the same command and --out {folder}; finished runs are kept", err=True)
        raise
    _show(outcome.comparison, folder)
    if outcome.failures:
        typer.secho(f"flexp: the comparison is incomplete; {len(outcome.failures)} missing:", fg="red", err=True)
        for line in outcome.failures:
            typer.secho(f"  {line}", fg="red", err=True)
        raise typer.Exit(INCOMPLETE)


def _list(wanted: Comparison, folder: Path) -> None:
    from flexp.comparison.cells import is_done
    from flexp.comparison.compare import plan

    count = 0
    for track in plan(wanted):
        for cell in [*track.tuning, *track.final]:
            shown = ", ".join(f"{key} = {value}" for key, value in cell.settings.items())
            state = "done" if is_done(cell, folder) else "to do"
            typer.echo(f"{state:6} {cell.folder}  {cell.purpose}  {cell.name}  {shown}")
            count += 1
        if track.chosen is None:
            for seed in wanted.seeds:
                typer.echo(f"later  cells/{track.entry.name}/final-seed-{seed}-…  with the best of its trials")
                count += 1
    typer.echo(f"{count} runs in {folder}")


def _numbers(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: expected a number of seeds, or seeds with commas") from None
    return numbers if "," in text else numbers[0]


def _show(comparison: dict[str, Any], folder: Path) -> None:
    """The table in the terminal, and every file of the report."""

    from flexp.comparison.report.tables import terminal_table
    from flexp.comparison.report.write import write_all

    shown = console(140)
    shown.print(terminal_table(comparison))
    for line in comparison["warnings"]:
        shown.print(f"warning: {line}", soft_wrap=True, markup=False)
    for path in write_all(comparison, folder):
        shown.print(f"{path}", soft_wrap=True, markup=False)
    shown.print(f"Saved in {folder}", soft_wrap=True, markup=False)


COMMANDS = {"compare": compare}
