"""What the commands of ``python -m benchmarks`` share: options, and how a result is shown."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[str, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")]
Kind = Annotated[str, typer.Option(help="causal-lm, sequence-classification or image-classification.")]
Cut = Annotated[str | None, typer.Option(metavar="S:E", help="Default: 1:L.")]
Pairs = Annotated[int, typer.Option(min=4, help="Pairs of steps.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")]


def prepared(model: str, threads: int) -> str:
    """Where a model is, fetched if need be; torch has its threads."""
    import torch

    from flexp.assets import resolve

    torch.set_num_threads(threads)
    return str(resolve(model))


def cut_of(text: str | None) -> tuple[int, int | None] | None:
    """The cut that an option says, if it says one."""
    from flexp.cli.verify import parse_cut

    return None if text is None else parse_cut(text)


def show(result: dict[str, Any], as_json: bool, rows: list[tuple[str, str]]) -> None:
    """A result as JSON, or its ``rows`` as a table."""
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title=f"python -m benchmarks {result['bench']}", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    machine_line(result)


def machine_line(result: dict[str, Any]) -> None:
    """Say what machine a result is of."""
    facts = result["machine"]
    typer.echo(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads")
