"""``python -m benchmarks link``, ``inference``, ``codec`` and ``slow-link``: what it costs that something crosses."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands.common import Cut, Json, Kind, Model, Pairs, Threads, cut_of, machine_line, prepared, show
from flexp.errors import ConfigError

Data = Annotated[str, typer.Option(help="Texts with labels: a file or asset:NAME.")]
Encoder = Annotated[str, typer.Option(help="An encoder: folder, Hugging Face id or asset:NAME.")]
Steps = Annotated[int, typer.Option(min=2, help="Training steps.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples of a step.")]
Length = Annotated[int, typer.Option(min=4, help="Tokens of a text, at most.")]
Tests = Annotated[int, typer.Option(min=1, help="Test examples.")]
Tuning = Annotated[str, typer.Option(help="full or lora.")]


def link(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Cut = None,
    pairs: Pairs = 12,
    tuning: Annotated[str, typer.Option(help="full or lora.")] = "full",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 32,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """A step over gRPC on this machine ÷ one inside the process."""
    from benchmarks.link import link_overhead as bench

    result = bench(
        prepared(model, threads), kind, cut=cut_of(cut), pairs=pairs, tuning=tuning, dtype=dtype,
        examples=examples, length=length,
    )  # fmt: skip
    low, high = result["ratio_quartiles"]
    show(
        result | {"model": model},
        as_json,
        [
            ("gRPC ÷ in-process (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("in-process step", f"{1e3 * result['in_process_seconds']:.1f} ms"),
            ("gRPC step", f"{1e3 * result['grpc_seconds']:.1f} ms"),
            ("bytes of a step", f"{result['tensor_bytes']} of tensors, {result['header_bytes']} besides"),
        ],
    )


def inference(
    model: Annotated[
        str | None, typer.Option(help="Default: a Llama of random weights, as the next three say.")
    ] = None,
    hidden: Annotated[int, typer.Option(min=64, help="Width; a multiple of 64.")] = 512,
    blocks: Annotated[int, typer.Option(min=3)] = 8,
    vocabulary: Annotated[int, typer.Option(min=256)] = 8192,
    cut: Annotated[str | None, typer.Option(metavar="S:E", help="Default: 1:L-1.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens to go on from.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of answers.")] = 8,
    round_trip: Annotated[float, typer.Option(min=0.0, help="Of the slow network, in milliseconds.")] = 50.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Tokens a second of a split model ÷ those of the whole one; and on a slow network."""
    import torch

    from benchmarks.inference import inference as bench

    torch.set_num_threads(threads)
    result = bench(
        None if model is None else prepared(model, threads), hidden=hidden, blocks=blocks, vocabulary=vocabulary,
        cut=cut_of(cut), prompt=prompt, tokens=tokens, pairs=pairs, round_trip=round_trip / 1e3, dtype=dtype,
    )  # fmt: skip
    low, high = result["ratio_quartiles"]
    show(
        result if model is None else result | {"model": model},
        as_json,
        [
            ("split ÷ whole, tokens a second (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("processor time, whole ÷ split", f"{result['cpu_ratio']:.3f}"),
            ("whole model", f"{result['whole_tokens_per_second']:.1f} tokens a second"),
            ("split, loopback", f"{result['split_tokens_per_second']:.1f} tokens a second"),
            (f"split, round trip {round_trip:g} ms", f"{result['slow_tokens_per_second']:.1f} tokens a second"),
            ("the same tokens", "yes" if result["same_tokens"] else "NO"),
        ],
    )


def codec(
    model: Encoder = "asset:minilm-l6",
    data: Data = "asset:sentiment",
    variant: Annotated[
        list[str] | None, typer.Option("--codec", help="NAME, or NAME+feedback; again for each. Default: all.")
    ] = None,
    steps: Steps = 60,
    batch_size: Batch = 8,
    max_length: Length = 64,
    test_examples: Tests = 512,
    tuning: Tuning = "full",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Bytes, time and change of loss of every codec, on a real model; the first is the reference."""
    import torch

    from benchmarks.codec import VARIANTS, codec_costs

    for name in variant or ():
        _check(name.removesuffix("+feedback"))
    torch.set_num_threads(threads)
    result = codec_costs(
        model, data, variants=variant or VARIANTS, steps=steps, batch_size=batch_size, max_length=max_length,
        test_examples=test_examples, tuning=tuning,
        say=lambda row: None if as_json else typer.echo(f"{row['codec']}: loss {row['loss']:.4f}"),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title=f"python -m benchmarks codec: {model}, {steps} steps", title_justify="left")
    names = ("codec", "kB/step", "÷ first", "enc. ms", "dec. ms", "loss", "change", "acc. %")
    for column in names:
        table.add_column(column, justify="left" if column == "codec" else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["codec"], f"{row['bytes'] / 1e3:.1f}", f"{row['ratio']:.3f}", f"{row['encode_ms']:.2f}",
            f"{row['decode_ms']:.2f}", f"{row['loss']:.4f}", f"{row['loss_change']:+.4f}",
            f"{100 * row['accuracy']:.1f}",
        )  # fmt: skip
    Console().print(table)
    machine_line(result)


def slow_link(
    model: Encoder = "asset:minilm-l6",
    data: Data = "asset:sentiment",
    blocks: Annotated[int, typer.Option(min=2, help="Only so many of the model's first blocks.")] = 2,
    round_trip: Annotated[float, typer.Option(min=0.0, help="Milliseconds.")] = 50.0,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="Mbit/s, each way.")] = 20.0,
    jitter: Annotated[float, typer.Option(min=0.0, help="Milliseconds, at most, of a message.")] = 0.0,
    name: Annotated[str, typer.Option("--codec", help="Of the faster run.")] = "int8-row",
    in_flight: Annotated[int, typer.Option(min=1, help="Exchanges under way, of the faster run.")] = 4,
    timed: Annotated[int, typer.Option(min=4, help="Steps over the network, which are timed.")] = 20,
    steps: Annotated[int, typer.Option(min=4, help="Steps in all; those that remain are not over the network.")] = 120,
    batch_size: Batch = 32,
    max_length: Length = 64,
    test_examples: Tests = 512,
    tuning: Tuning = "full",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Steps with a codec and several exchanges under way ÷ plain float32 ones, on a slow network that is emulated."""
    import torch

    from benchmarks.slow_link import slow_link as bench
    from flexp.links.emulated import Network

    torch.set_num_threads(threads)
    network = Network(
        latency_s=round_trip / 2e3, jitter_s=jitter / 1e3, uplink_bps=1e6 * bandwidth, downlink_bps=1e6 * bandwidth
    )
    result = bench(
        model, data, network=network, codec=_check(name), in_flight=in_flight, blocks=blocks, steps=steps, timed=timed,
        batch_size=batch_size, max_length=max_length, test_examples=test_examples, tuning=tuning,
        say=lambda line: None if as_json else typer.echo(line),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    low, high = result["ratio_quartiles"]
    table = Table(title="python -m benchmarks slow-link", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for row in (
        ("steps a second: fast ÷ plain (median of pairs)", f"{result['ratio']:.2f}"),
        ("quartiles", f"{low:.2f} – {high:.2f}"),
        ("plain step (float32, one exchange)", f"{result['plain_seconds']:.2f} s, {result['plain_bytes']:,.0f} bytes"),
        (
            f"fast step ({name}, {in_flight} under way)",
            f"{result['fast_seconds']:.2f} s, {result['fast_bytes']:,.0f} bytes",
        ),
        ("test loss: plain, fast", f"{result['plain_loss']:.4f}, {result['fast_loss']:.4f}"),
        ("change", f"{result['loss_change']:+.4f}"),
        ("test accuracy: plain, fast", ", ".join(f"{100 * value:.1f} %" for value in result["accuracy"])),
    ):
        table.add_row(*row)
    Console().print(table)
    machine_line(result)


def _check(name: str) -> Any:
    from flexp.config import CodecName

    if name not in get_args(CodecName):
        raise ConfigError(f"--codec {name}: expected {', '.join(get_args(CodecName))}")
    return name
