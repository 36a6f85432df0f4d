"""``flexp plan``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flexp.cli.settings import Force
from flexp.errors import ConfigError
from flexp.registry import METHODS


def plan(
    model: Annotated[str, typer.Argument(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")],
    devices: Annotated[Path, typer.Option("--devices", metavar="FLEET.toml", help="The fleet (docs/planner.md).")],
    out: Annotated[Path | None, typer.Option(help="Write the plan as JSON, for data.clients.plan.")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Also the front of time, accuracy and bytes.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="PAGE.html", help="Write a page with figures.")] = None,
    pilots: Annotated[
        list[Path] | None,
        typer.Option("--pilots", metavar="DIR", help="Fit the accuracy curve to finished runs; again for each."),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(metavar="CURVE.json", help="Use this accuracy curve; with --pilots: write it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override the fleet, e.g. task.length=64.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON instead of a table.")] = False,
    force: Force = False,
) -> None:
    """Choose every device's cut, micro-batch and more for a model; nothing is trained or loaded, but to keep a bound on
    content words."""
    from flexp.files import check_new
    from flexp.planner.accuracy import AccuracyCurve, fit, prior, read_pilots
    from flexp.planner.document import document
    from flexp.planner.model import ModelCosts
    from flexp.planner.pareto import front
    from flexp.planner.plan import make_plan
    from flexp.run.planned import load_fleet, plan_within

    check_new(out, force=force, read=[devices])
    check_new(plot, "--plot", force=force, read=[devices])
    if pilots:
        check_new(curve, "--curve", force=force, read=[devices])
    fleet = load_fleet(devices, settings or ())
    known = prior()
    if pilots:
        scores, name, score = read_pilots(pilots)
        known = fit(scores, name, score)
        if curve is not None:
            known.write(curve)
    elif curve is not None:
        known = AccuracyCurve.read(curve)
    if known.model and known.model != Path(model).name:
        raise ConfigError(
            f"the accuracy curve is of {known.model}, not of {Path(model).name}; run pilots of this model"
        )
    if fleet.privacy.max_content_words is None:
        made = make_plan(fleet, ModelCosts(model, fleet.task, fleet.choices, fleet.server), known)
        content = document(made, front(made) if pareto else ())
    else:
        kept = plan_within(fleet, model, known, partial(typer.echo, err=True))
        content = kept.document(document(kept.plan, front(kept.plan) if pareto else ()))
    if as_json:
        typer.echo(json.dumps(content))
    else:
        show(content)
        typer.echo(_taken_over(content))
    if out is not None:
        from flexp.files import write_json

        write_json(out, content)
    if out is not None and not as_json:
        typer.echo(f"Plan: {out} (flexp run CONFIG.toml --set data.clients.plan={out})")
    if plot is not None:
        from flexp.files import write_text
        from flexp.report.planning import render

        write_text(plot, render(content))
        if not as_json:
            typer.echo(f"Page: {plot}")


def _taken_over(content: dict[str, Any]) -> str:
    """What a run that follows the plan must be told besides: what is one setting for all clients."""
    first = content["clients"][0]
    settings = [f"train.batch_size = {first['micro_batch'] * first['accumulation']}"]
    if defence := content.get("privacy"):
        settings += [f"privacy.max_content_words = {defence['max_content_words']:g}"]
        settings += ['model.pooling = "mean"', "privacy.pool = true"] if defence["pool"] else []
        settings += [f'privacy.penalty = "{defence["penalty"]}"'] if defence["penalty"] != "off" else []
        settings += [f"privacy.noise = {defence['noise']:g}"] if defence["noise"] else []
    settings += [f'model.{name} = "file"' for name in ("embeddings", "blocks") if content["task"][name] == "file"]
    if first["rank"]:
        settings += ['model.tuning = "lora"', f"model.lora.rank = {first['rank']}"]
    own = [name for name in METHODS if METHODS.owner(name) == "flexp" and METHODS[name].held.part == "ends"]
    return (
        "A run takes cuts, micro-batches, checkpointing and codecs from the plan for each client (other methods than "
        f"{', '.join(own[:-1])} and {own[-1]}, and train.in_flight above 1: the cuts); it must say "
        f"{', '.join(settings)}."
    )


def _defences(privacy: dict[str, Any]) -> Any:
    """What was tried to keep a bound on content words."""
    from rich.table import Table

    bound = f"{100 * privacy['max_content_words']:g} %"
    table = Table(title=f"Content words of public texts that are read: at most {bound}", title_justify="left")
    for column in ("defence", "s", "read", "costs", ""):
        table.add_column(column, justify="right" if column in ("s", "read", "costs") else "left")
    for row in privacy["tried"]:
        end = "chosen" if row["chosen"] else "fits no device" if row["lacks"] else "" if row["kept"] else "tells more"
        price = f"{100 * row['price']:.1f} points"
        table.add_row(row["with"], str(row["s"]), f"{100 * row['content']:.0f} %", price, end)
    return table


def show(content: dict[str, Any]) -> None:
    """Print a plan's table, with a row for clients that are alike."""
    from rich.console import Console
    from rich.table import Table

    from flexp.report import formats
    from flexp.report.planning import alike

    console = Console()
    totals, accuracy = content["totals"], content["accuracy"]
    table = Table(title=f"flexp plan: {content['model']} on {content['fleet']}", title_justify="left")
    for column in ("client", "cut", "exchange", "memory", "has", "step", "up", "down"):
        table.add_column(column, justify="left" if column == "client" else "right")
    rows = alike(content)
    for row in rows:
        found = row["predicted"]
        extra = [
            *(["checkpointing"] if row["checkpointing"] else []),
            *([f"rank {row['rank']}"] if row["rank"] else []),
            *([row["codec"]] if row["codec"] != "none" else []),
        ]
        table.add_row(
            row["label"], formats.cut(row["cut"]), ", ".join([f"{row['micro_batch']} × {row['accumulation']}", *extra]),
            formats.size(found["memory_bytes"]), formats.size(row["memory_available_bytes"]),
            formats.seconds(found["step_seconds"]), formats.size(found["bytes_up"]), formats.size(found["bytes_down"]),
        )  # fmt: skip
    console.print(table)
    if "privacy" in content:
        console.print(_defences(content["privacy"]))
    for row in rows:
        why, found = row["why_not"], row["predicted"]
        parts = [f"{formats.seconds(found[f'{part}_seconds'])} {part}" for part in ("client", "link", "server")]
        typer.echo(f"{row['label']} holds {row['holds']}; a step is {', '.join(parts)}.")
        typer.echo(f"    Not deeper: {why['deeper']}. Not shallower: {why['shallower']}.")
    typer.echo(
        f"Everybody's step: {formats.seconds(totals['round_seconds'])}, of which the server works "
        f"{formats.seconds(totals['server_seconds'])} and holds {formats.size(totals['server_memory_bytes'])} of "
        f"{formats.size(content['server']['memory_bytes'])}."
    )
    typer.echo(f"Expected loss of personal accuracy: {100 * totals['loss']:.1f} points, by {accuracy['note']}.")
    if content["pareto"]:
        front = Table(title="Pareto front", title_justify="left")
        for column in ("round", "loss (points)", "bytes of a step", "cuts"):
            front.add_column(column, justify="left" if column == "cuts" else "right")
        for point in content["pareto"]:
            taken = point["totals"]
            cuts: dict[str, int] = {}
            for client in point["clients"]:
                text = formats.cut(client["cut"]) + ("" if client["codec"] == "none" else f" {client['codec']}")
                cuts[text] = cuts.get(text, 0) + 1
            front.add_row(
                formats.seconds(taken["round_seconds"]), f"{100 * taken['loss']:.2f}", formats.size(taken["bytes"]),
                ", ".join(f"{count} × {text}" for text, count in sorted(cuts.items())),
            )  # fmt: skip
        console.print(front)


COMMANDS = {"plan": plan}
