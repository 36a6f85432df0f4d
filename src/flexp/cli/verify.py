"""``flexp verify``: prove that a model trains split exactly as it trains whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexp.cli.settings import Device, console
from flexp.errors import ConfigError
from flexp.kinds import ModelKind

if TYPE_CHECKING:
    from flexp.run.verify import Outcome, Setup

NOT_EXACT = 1


Tuning = Literal["full", "lora"]
Dtype = Literal["float32", "bfloat16"]


def verify(
    model: Annotated[
        str | None, typer.Argument(help="Folder, Hugging Face id, asset:NAME or arch:NAME.", show_default=False)
    ] = None,
    cut: Annotated[
        str | None, typer.Option(metavar="S:E", help="The server runs blocks [S, E). Default: all but the outermost.")
    ] = None,
    task: Annotated[
        ModelKind | None, typer.Option(help="What the model is for. Default: as its checkpoint says.")
    ] = None,
    tuning: Annotated[
        Tuning | None,
        typer.Option(
            help="Everything, embeddings included, or adapters. Default: full; of quantised blocks lora.",
            show_default=False,
        ),
    ] = None,
    padding: Annotated[
        Literal["none", "left", "right"], typer.Option(help="Which side of the batches is padded.")
    ] = "none",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 3,
    base_depth: Annotated[
        int | None, typer.Option(min=0, help="First block that the server holds. Default: S.", show_default=False)
    ] = None,
    link: Annotated[
        str, typer.Option(metavar="in-process|grpc", help="How the client reaches the server.")
    ] = "in-process",
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = "float32",
    autocast: Annotated[bool, typer.Option("--autocast", help="Compute matrix products in bfloat16.")] = False,
    quantization: Annotated[
        Literal["off", "int8", "nf4"], typer.Option(help="Of the blocks' linear layers, on both sides.")
    ] = "off",
    quantize_ends: Annotated[
        bool, typer.Option("--quantize-ends", help="Likewise of the token embeddings and a language model's head.")
    ] = False,
    attention: Annotated[Literal["sdpa", "eager"], typer.Option(help="Models without SDPA run eager anyway.")] = "sdpa",
    memory: Annotated[
        Literal["keep", "recompute"], typer.Option(help="What the server does with its activations.")
    ] = "keep",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Checkpoint the client's blocks.")] = False,
    pooling: Annotated[
        Literal["checkpoint", "mean", "last", "cls"], typer.Option(help="What a text classifier's head reads.")
    ] = "checkpoint",
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 3,
    length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the batches, and of weights that no checkpoint holds.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Torch's threads.", show_default=False)] = None,
    device: Device = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the architectures, also those refused, and stop.")
    ] = False,
    all_: Annotated[bool, typer.Option("--all", help="Verify every architecture of --list.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a model whole and split, side by side, and compare: exit code 0 if nothing differs, 1 if something does.

    One client, no alignment, no dropout, no clipping, AdamW, random inputs: only then are the two the same computation.
    """
    if list_:
        _print_list(json_)
        return
    if all_ == (model is not None):
        raise ConfigError("expected a model (folder, Hugging Face id, asset:NAME, arch:NAME), or --all, or --list")
    import torch
    from rich.console import Console

    from flexp.run.verify import Setup, verify_all
    from flexp.run.verify import verify as compare

    if threads is not None:
        torch.set_num_threads(threads)
    setup = Setup.of(
        model or "",
        task=task,
        cut=None if cut is None else parse_cut(cut),
        base_depth=base_depth,
        tuning=tuning or ("full" if quantization == "off" else "lora"),
        padding=padding,
        steps=steps,
        link=link,
        dtype=dtype,
        autocast="bfloat16" if autocast else "off",
        quantization=quantization,
        quantize_ends=quantize_ends,
        attention=attention,
        memory=memory,
        gradient_checkpointing=checkpointing,
        pooling=pooling,
        batch=batch,
        length=length,
        seed=seed,
        device=device or "cpu",
    )
    with Console(stderr=True).status("comparing") as spinner:
        outcomes = list(verify_all(setup, spinner.update)) if all_ else [compare(setup)]
    if json_:
        values = [outcome.as_json() for outcome in outcomes]
        typer.echo(json.dumps(values if all_ else values[0], indent=2))
    elif all_:
        _print_table(outcomes)
    else:
        _print_one(outcomes[0])
    if not all(outcome.exact for outcome in outcomes):
        raise typer.Exit(NOT_EXACT)


def parse_cut(text: str, option: str = "--cut") -> tuple[int, int | None]:
    """(s, e) from ``S:E``, the value of an option; without E, the server runs to the last block.

    Raises:
        ConfigError: the text is no cut.
    """
    start, colon, stop = text.partition(":")
    if not (colon and start.strip().isdecimal() and (stop.strip().isdecimal() or not stop.strip())):
        raise ConfigError(f"{option} {text!r} is no cut: expected S:E, such as 1:3 (the server runs blocks [1, 3))")
    return int(start), int(stop) if stop.strip() else None


def _print_list(as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from flexp.models.architectures import ARCHITECTURES

    if as_json:
        entries = [
            {"name": key, "tasks": spec.tasks, "refused": spec.reason or None} for key, spec in ARCHITECTURES.items()
        ]
        typer.echo(json.dumps(entries, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("architecture", no_wrap=True)
    table.add_column("split", no_wrap=True)
    table.add_column("tasks, or why it is refused", overflow="fold")
    for key, spec in ARCHITECTURES.items():
        table.add_row(
            f"arch:{key}",
            "[red]refused[/]" if spec.refused else "[green]exact[/]",
            escape(spec.reason or ", ".join(spec.tasks)),
        )
    console().print(table)


def _print_table(outcomes: list[Outcome]) -> None:
    from rich.markup import escape
    from rich.table import Table

    typer.echo(f"{_settings(outcomes[0].setup)}; largest absolute difference between whole and split:\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("architecture", no_wrap=True)
    for title in ("cut", "attention", "logits", "gradients", "losses", "weights"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("", overflow="fold")
    for outcome in outcomes:
        setup = outcome.setup
        table.add_row(
            setup.model.id.removeprefix("arch:"),
            f"{setup.cut[0]}:{setup.cut[1]}/{outcome.blocks}" if setup.cut else "",
            setup.model.attention,
            *_differences(outcome).values(),
            "[green]exact[/]" if outcome.exact else f"[red]{escape(outcome.error or 'differs')}[/]",
        )
    console().print(table)


def _print_one(outcome: Outcome) -> None:
    setup = outcome.setup
    assert setup.cut is not None
    start, stop = setup.cut
    typer.echo(f"{setup.model.id}: {setup.task}, {outcome.blocks} blocks, {setup.model.attention} attention")
    typer.echo(f"the server runs blocks [{start}, {stop}) and holds [{setup.model.base_depth}, {stop})")
    typer.echo(f"{_settings(setup)}; {outcome.tensors} tensors trained")
    typer.echo("\nlargest absolute difference between whole and split")
    for key, value in _differences(outcome).items():
        typer.echo(f"  {key:10} {value}")
    verdict = "exact: split training is the whole model's" if outcome.exact else "NOT exact: split training differs"
    typer.echo(f"\n{verdict}")


def _settings(setup: Setup) -> str:
    """What was done, in a few lines."""
    model = setup.model
    return (
        f"{model.tuning} tuning in {model.dtype} (autocast: {model.autocast}, quantization: {model.quantization}"
        f"{', ends too' if model.quantize_ends else ''}), "
        f"{setup.steps} steps of AdamW without clipping, dropout set to 0,\n"
        f"random inputs ({setup.batch} examples of {setup.length} tokens, padding: {setup.padding}; images unpadded),\n"
        f"server memory: {setup.memory}, checkpointing: {'on' if model.gradient_checkpointing else 'off'}, "
        f"link: {setup.link}"
    )


def _differences(outcome: Outcome) -> dict[str, str]:
    values = {key: getattr(outcome, key) for key in ("logits", "gradients", "losses", "weights")}
    return {key: f"{value:.2g}" if value else "0.0" for key, value in values.items()}


COMMANDS = {"verify": verify}
