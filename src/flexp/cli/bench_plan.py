"""``flexp bench plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def plan(
    fleets: Annotated[
        list[Path] | None, typer.Argument(help="fleet.toml files; default: those in experiments/fleets.")
    ] = None,
    model: Annotated[str, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")] = "asset:minilm-l6",
    curve: Annotated[
        Path | None, typer.Option(metavar="CURVE.json", help="An accuracy curve; default: the prior.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every client on the virtual clock.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Optimised plans beside the deepest cuts that fit, and beside one cut for everybody."""
    from rich.console import Console
    from rich.table import Table

    from flexp.bench.plan import bench_plan
    from flexp.planner.accuracy import AccuracyCurve
    from flexp.report import formats

    files = fleets or sorted(Path("experiments/fleets").glob("*.toml"))
    result = bench_plan(files, model, None if curve is None else AccuracyCurve.read(curve), steps)
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title=f"flexp bench plan: {model}, {steps} steps of every client", title_justify="left")
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
