"""``flexp export``, ``flexp evaluate`` and ``flexp predict``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexp.cli.reaching import SECURED, WHOSE, Secured, Whose, grouped, reaching
from flexp.cli.settings import Device, Force, console
from flexp.errors import ConfigError
from flexp.finite import NOT_FINITE, is_broken

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from flexp.export.trained import Trained
    from flexp.report.tables import Table

Batch = Annotated[int | None, typer.Option(min=1, help="Examples at once; default: as in the run.")]


@grouped
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or what flexp client left, with --server.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder.")],
    whose: Whose = WHOSE,
    merge: Annotated[
        bool, typer.Option("--merge", help="The whole model, adapters merged into it (the default).")
    ] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="With LoRA: a peft adapter over the base model.")] = False,
    base: Annotated[
        bool, typer.Option("--base", help="What all clients have alike, merged: a base for their adapters.")
    ] = False,
    over: Annotated[
        Path | None, typer.Option("--over", metavar="BASE", help="With --adapter: without what this --base has.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as trained.")] = None,
    secured: Secured = SECURED,
) -> None:
    """Write a client's personal model as a folder that transformers (or peft) loads."""
    if merge + adapter + base > 1:
        raise ConfigError(
            "--merge gives the whole model, --adapter only what was added to it, --base what all have alike: choose one"
        )
    from flexp.export.folder import DTYPES, check_target
    from flexp.export.folder import export as write
    from flexp.export.opening import open_trained

    check_target(out, dtype)
    if base:
        from flexp.export.base import write_base
        from flexp.export.saved import look_into

        if whose.client is not None or whose.server is not None or over is not None:
            raise ConfigError("--base is of all clients of a run in a folder: leave out --client, --server and --over")
        opened_run = look_into(run, whose.number)
        count = write_base(opened_run, out, None if dtype is None else DTYPES[dtype])
        typer.echo(f"after round {opened_run.round}: a base in {out}, with {count} weights that all clients have alike")
        return
    opened = open_trained(run, whose.client, whose.number, reaching(whose, secured))
    facts = write(opened, out, "adapter" if adapter else "whole", dtype, over)
    what = "a peft adapter" if adapter else "a whole model"
    typer.echo(f"{facts['client']!r} after round {facts['round']}: {what} ({facts['dtype']}) in {out}")


@grouped
def evaluate(
    model: Annotated[Path, typer.Argument(help="The folder of a run, an exported one, or what flexp client left.")],
    whose: Whose = WHOSE,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Score on this file of the run's task.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Of an exported model: score on this run's test data.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Also the model before training.")] = False,
    batch_size: Batch = None,
    harness: Annotated[
        str | None,
        typer.Option("--harness", metavar="TASKS", help="Of a language model: tasks of lm-eval, joined by commas."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option("--tasks-dir", metavar="DIR", help="With --harness: your own tasks (YAML files).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --harness: only so many examples of each task.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    secured: Secured = SECURED,
    device: Device = None,
) -> None:
    """Score a personal model on its client's own test data and on everybody's, or on a file."""
    from flexp.export.answers import score
    from flexp.export.opening import open_trained

    opened = open_trained(model, whose.client, whose.number, reaching(whose, secured), run, device)
    try:
        if harness is not None:
            _harness(opened, harness, tasks_dir, limit, batch_size, pretrained, as_json)
            return
        if tasks_dir is not None or limit is not None:
            raise ConfigError("--tasks-dir and --limit go with --harness TASKS: say which tasks")
        scores = {"personal": score(opened, data, batch_size, say=_say)}
        if pretrained:
            scores = {"pretrained": score(opened, data, batch_size, pretrained=True), **scores}
    finally:
        opened.close()
    if opened.unchecked is not None:
        typer.echo(f"flexp evaluate: {opened.unchecked}", err=True)
    for which, by_set in scores.items():
        for name, own in by_set.items():
            if is_broken(own):
                typer.echo(
                    f"flexp evaluate: the {which} model of {opened.client} answers {own[NOT_FINITE]} of {own['n']} "
                    f"examples with numbers that are not finite: no scores on {name}",
                    err=True,
                )
    metric = opened.task.metric
    if as_json:
        facts = {"client": opened.client, "round": opened.round, "metric": metric, "scores": _finite(scores)}
        typer.echo(json.dumps(facts, indent=2))
        return

    for shown in _tables(scores, metric, opened.client, opened.round):
        console().print(shown)


@grouped
def predict(
    model: Annotated[Path, typer.Argument(help="The folder of a run, an exported one, or what flexp client left.")],
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Rows of the run's task; labels are not needed.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to: a .csv or a .jsonl.")],
    whose: Whose = WHOSE,
    batch_size: Batch = None,
    force: Force = False,
    secured: Secured = SECURED,
    device: Device = None,
) -> None:
    """Let a classifier label a file: one line a row, with the probability of every label."""
    from flexp.export.answers import predict as write
    from flexp.export.opening import open_trained

    opened = open_trained(model, whose.client, whose.number, reaching(whose, secured), device=device)
    try:
        count = write(opened, data, out, batch_size, force=force, say=_say)
    finally:
        opened.close()
    typer.echo(f"{count} rows labelled in {out}")


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _tables(scores: dict[str, dict[str, dict[str, float]]], metric: str, client: str, number: int) -> list[RichTable]:
    from flexp.report.scores import score_tables

    found = {f"{which}: {name}": own for which, by_set in scores.items() for name, own in by_set.items()}
    tables = score_tables(found, metric, "Model: data", "on the data that are named")
    tables[0] = replace(tables[0], title=f"{client} after round {number}", caption="")

    def titles(table: Table) -> list[str]:
        """A cell's unit goes into its column's title."""
        share = [any(row[at].endswith(" %") for row in table.rows) for at in range(len(table.headers))]
        return [f"{title} %" if percent else title for title, percent in zip(table.headers, share, strict=True)]

    return [table.terminal(titles(table)) for table in tables]


def _harness(
    opened: Trained,
    tasks: str,
    folder: Path | None,
    limit: int | None,
    batch_size: int | None,
    pretrained: bool,
    as_json: bool,
) -> None:
    try:
        from flexp.export.harness import run_harness
    except ImportError as error:
        raise ConfigError(f"--harness needs lm-eval ({error}): pip install 'flexp[lm-eval]'") from error
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = {
        which: run_harness(opened, names, folder, limit=limit, batch_size=batch_size, pretrained=which == "pretrained")
        for which in (["pretrained"] if pretrained else []) + ["personal"]
    }
    if as_json:
        facts = {"client": opened.client, "round": opened.round, "harness": _finite(found)}
        typer.echo(json.dumps(facts, indent=2))
        return
    for which, results in found.items():
        for task, scores in results.items():
            for metric, value in scores.items():
                typer.echo(f"{which:<11} {task:<24} {metric:<32} {value:.4f}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


COMMANDS = {"export": export, "evaluate": evaluate, "predict": predict}
