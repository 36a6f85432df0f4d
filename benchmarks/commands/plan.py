"""``python -m benchmarks plan``, ``predict`` and ``recut``: what plans are worth, what they rest on, and moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.commands.common import Json, Threads, machine_line
from flexp.errors import ConfigError


def plan(
    fleets: Annotated[
        list[Path] | None, typer.Argument(help="fleet.toml files; default: those in experiments/fleets.")
    ] = None,
    model: Annotated[str, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")] = "asset:minilm-l6",
    curve: Annotated[
        Path | None, typer.Option(metavar="CURVE.json", help="An accuracy curve; default: the prior.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every client on the virtual clock.")] = 20,
    as_json: Json = False,
) -> None:
    """Optimised plans beside the deepest cuts that fit, and beside one cut for everybody."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.plan import bench_plan
    from flexp.planner.accuracy import AccuracyCurve
    from flexp.report import formats

    files = fleets or sorted(Path("experiments/fleets").glob("*.toml"))
    result = bench_plan(files, model, None if curve is None else AccuracyCurve.read(curve), steps)
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title=f"python -m benchmarks plan: {model}, {steps} steps of every client", title_justify="left")
    for column in ("fleet", "plan", "cuts", "objective", "loss", "virtual time", "÷ optimised", "÷ equal accuracy"):
        table.add_column(column, justify="left" if column in ("fleet", "plan", "cuts") else "right")
    for row in result["rows"]:
        best = row["ways"]["optimised"]
        for name, way in row["ways"].items():
            first = way is best
            equal = way.get("equal_accuracy")
            cuts = [formats.cut(cut) for cut in way["cuts"]]
            table.add_row(
                f"{row['fleet']} ({row['clients']})" if first else "", name,
                cuts[0] if len(cuts) == 1 else f"{cuts[0]} … {cuts[-1]}", f"{way['objective']:.3f}",
                f"{100 * way['loss']:.1f}", formats.seconds(way["virtual_seconds"]),
                "" if first else f"{way['virtual_seconds'] / best['virtual_seconds']:.2f}",
                "" if equal is None else f"{way['virtual_seconds'] / equal['virtual_seconds']:.2f}",
            )  # fmt: skip
    Console().print(table)
    slowest = max(row["plan_seconds"] for row in result["rows"])
    source = result["rows"][0]["accuracy"]
    typer.echo(f"Losses are expected points of accuracy ({source}); planned in at most {slowest:.1f} s.")


def predict(
    model: Annotated[list[str] | None, typer.Option(help="bert, llama or gpt2; again for each. Default: all.")] = None,
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=2)] = 64,
    tuning: Annotated[str, typer.Option(help="full or lora.")] = "full",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Checkpoint the client's blocks.")] = False,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Predicted against measured: a client's peak memory and a step's time, for five cuts of three architectures."""
    import torch

    from benchmarks.predictions import MODELS, error
    from benchmarks.predictions import predictions as bench

    for name in model or ():
        if name not in MODELS:
            raise ConfigError(f"--model {name}: expected one of {', '.join(MODELS)}")
    torch.set_num_threads(threads)
    result = bench(
        models=model or tuple(MODELS), examples=examples, length=length, tuning=tuning, checkpointing=checkpointing,
        say=None if as_json else typer.echo,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="python -m benchmarks predict: predicted, measured (error)", title_justify="left")
    for column in ("model", "cut", "peak memory, MB", "client's step, ms", "client + server, ms"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["rows"]:
        cells = [
            f"{unit * row[key][0]:.0f}, {unit * row[key][1]:.0f} ({100 * error(row[key]):+.1f} %)"
            for key, unit in (("memory_bytes", 1e-6), ("client_seconds", 1e3), ("seconds", 1e3))
        ]
        table.add_row(row["model"], f"{row['cut'][0]}:{row['cut'][1]}/{row['blocks']}", *cells)
    Console().print(table)
    worst = ", ".join(f"{100 * result['worst'][key]:.1f} %" for key in ("memory_bytes", "client_seconds", "seconds"))
    typer.echo(f"largest errors: {worst}")
    machine_line(result)


def recut(
    config: Annotated[Path, typer.Argument(help="A run's configuration; real data make the losses mean something.")],
    client: Annotated[str | None, typer.Option(help="Which client of the data; of several it must be said.")] = None,
    cuts: Annotated[str, typer.Option(metavar="S:E,…", help="One after another.")] = "1:6,4:6,1:6,4:6",
    steps: Annotated[int, typer.Option(min=20, help="With each cut.")] = 20,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. threads=1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What moving a cut costs in the time of steps, and what it does to the loss, beside a twin that does not move."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.recut import bench
    from flexp.cli.verify import parse_cut
    from flexp.config.loading import load

    loaded = load(config, list(settings or ()))
    result = bench(loaded, [parse_cut(cut) for cut in cuts.split(",")], client=client, steps=steps)
    if as_json:
        typer.echo(json.dumps(result))
        return
    title = f"python -m benchmarks recut: {result['client']}, {result['steps']} steps with each cut"
    table = Table(title=title, title_justify="left")
    for column in ("move", "blocks", "s", "steps", "before", "after", "spread", "change", "twin", "jump"):
        table.add_column(column, justify="left" if column in ("move", "blocks") else "right", no_wrap=True)
    for row in result["rows"]:
        blocks = f"+{len(row['came'])}" if row["came"] else f"-{len(row['went'])}"
        table.add_row(
            " > ".join(":".join(map(str, row[key])) for key in ("before", "after")),
            f"{blocks} ({len(row['restored'])} back)" if row["restored"] else blocks,
            *(f"{row[key]:.2f}" for key in ("seconds", "steps", "loss_before", "loss_after", "spread")),
            *(f"{row[key]:+.2f}" for key in ("loss_change", "twin_change", "jump")),
        )
    Console().print(table)
    typer.echo(
        f"s, steps: a move's time. Losses before and after are means of {result['window']} steps, spread is theirs; "
        f"jump is the change less the twin's. At the end {result['loss_end']:.3f}, the twin that stayed at "
        f"its first cut {result['twin_loss_end']:.3f}"
    )
    machine_line(result)
