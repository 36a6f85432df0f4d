"""How a bench is a command: the options that several have, and how a result is shown."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from flexp.assets import resolve
from flexp.machine import machine

Model = Annotated[str, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")]
Kind = Annotated[str, typer.Option(help="causal-lm, sequence-classification or image-classification.")]
Encoder = Annotated[str, typer.Option(help="An encoder: folder, Hugging Face id or asset:NAME.")]
Data = Annotated[str, typer.Option(help="Texts with labels: a file or asset:NAME.")]
Cut = Annotated[str | None, typer.Option(metavar="S:E", help="Default: 1:L.")]
Tuning = Annotated[str, typer.Option(help="full or lora.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Pairs = Annotated[int, typer.Option(min=4, help="Pairs of steps.")]
Examples = Annotated[int, typer.Option(min=1, help="Of a batch.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of an example.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")]
Steps = Annotated[int, typer.Option(min=2, help="Training steps.")]
Tests = Annotated[int, typer.Option(min=1, help="Test examples.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass
class Result:
    """``facts`` are printed as JSON, or else a table of ``rows`` under ``columns`` and then the ``notes``.

    ``failed`` says in one line what the measurement shows to be wrong: the command then ends with an error.
    """

    facts: dict[str, Any]
    rows: Sequence[Sequence[str]] = ()
    columns: Sequence[str] = ("what", "measured")
    notes: Sequence[str] = ()
    failed: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]


def say(line: str) -> None:
    """Tell how far a measurement is, beside its result."""
    typer.echo(line, err=True)


def fetched(model: str, threads: int) -> str:
    """Where a model is, fetched if need be; torch computes with so many threads."""
    torch.set_num_threads(threads)
    return str(resolve(model))


def command(name: str, measure: Callable[..., Result]) -> Callable[..., None]:
    """A command with the options of ``measure`` and ``--json``, which shows what it gives."""

    def run(as_json: bool, **options: Any) -> None:
        result = measure(**options)
        result.facts = {"bench": name, **result.facts, "machine": machine()}
        if as_json:
            typer.echo(json.dumps(result.facts))
        else:
            _show(f"python -m benchmarks {name}", result)
        if result.failed is not None:
            typer.echo(result.failed, err=True)
            raise typer.Exit(1)

    own = inspect.signature(measure, eval_str=True)
    options = [*own.parameters.values()]
    options.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))
    run.__doc__ = measure.__doc__
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__signature__ = own.replace(parameters=options, return_annotation=None)  # type: ignore[attr-defined]
    return run


def _show(title: str, result: Result) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(result.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in result.rows:
        table.add_row(*row)
    if result.rows:
        Console().print(table)
    for note in result.notes:
        typer.echo(note)
    facts = result.facts["machine"]
    typer.echo(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads")
