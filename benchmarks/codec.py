"""Bytes, time and change of loss of every codec, on a real model and real data.

Every codec trains the same client for the same steps, both cuts, both directions, from the same weights; ``off`` is the
reference. Predicted (docs/design.md has the measurements that it rests on): no change beyond ±0.02, with int4 the
largest; 0.5, 0.25 and 0.14 of the bytes; and at most 5 ms to encode and decode the (8, 64, 384) of one message.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer

from benchmarks.tools.command import Data, Encoder, Examples, Length, Result, Steps, Tests, Threads, Tuning, say
from benchmarks.tools.one_client import OneClient, check_codec, one_client_world, without_dropout
from flexp.config import CodecConfig
from flexp.links.codecs import codec_of

VARIANTS = ("off", "fp32", "bf16", "fp16", "int8-channel", "int8-row", "fp8", "int4", "int4+feedback")
COLUMNS = ("codec", "kB/step", "÷ first", "enc. ms", "dec. ms", "loss", "change", "acc. %")


def measure(
    model: Encoder = "asset:minilm-l6",
    data: Data = "asset:sentiment",
    variants: Annotated[
        list[str] | None, typer.Option("--codec", help="NAME, or NAME+feedback; again for each. Default: all.")
    ] = None,
    steps: Steps = 60,
    batch_size: Examples = 8,
    max_length: Length = 64,
    test_examples: Tests = 512,
    tuning: Tuning = "full",
    threads: Threads = 1,
) -> Result:
    """Bytes, time and change of loss of every codec, on a real model; the first is the reference."""
    for name in variants or ():
        check_codec(name.removesuffix("+feedback"))
    torch.set_num_threads(threads)
    found: list[dict[str, Any]] = []
    with without_dropout(model) as (folder, blocks):
        world = one_client_world(
            folder, data, blocks=blocks, steps=steps, batch_size=batch_size, max_length=max_length,
            test_examples=test_examples, tuning=tuning, tail=1,
        )  # fmt: skip
        message = (batch_size, max_length, world.source.anatomy.hidden)
        for variant in variants or VARIANTS:
            name, _, feedback = variant.partition("+")
            run = OneClient(world, CodecConfig.all(check_codec(name), error_feedback=bool(feedback)))
            for _ in range(steps):
                run.step()
            size, scores = run.bytes() / steps, run.scores()
            run.method.close()
            first = found[0] if found else {"bytes": size, "loss": scores["loss"]}
            encode, decode = _times(name, message)
            found.append({
                "codec": variant, "bytes": size, "ratio": size / first["bytes"], "encode_ms": encode,
                "decode_ms": decode, "loss": scores["loss"], "loss_change": scores["loss"] - first["loss"],
                "accuracy": scores["accuracy"],
            })  # fmt: skip
            say(f"{variant}: loss {scores['loss']:.4f}")
    facts = {
        "model": model, "tuning": tuning, "steps": steps, "batch_size": batch_size, "message": list(message),
        "test_examples": test_examples, "rows": found,
    }  # fmt: skip
    rows = [
        (
            row["codec"], f"{row['bytes'] / 1e3:.1f}", f"{row['ratio']:.3f}", f"{row['encode_ms']:.2f}",
            f"{row['decode_ms']:.2f}", f"{row['loss']:.4f}", f"{row['loss_change']:+.4f}",
            f"{100 * row['accuracy']:.1f}",
        )
        for row in found
    ]  # fmt: skip
    return Result(facts, rows, COLUMNS)


def _times(name: str, shape: tuple[int, ...], repeats: int = 15) -> tuple[float, float]:
    """Median milliseconds to encode and to decode a float32 tensor."""
    if name == "off":
        return 0.0, 0.0
    codec, value = codec_of(name, torch.float32), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        began = time.perf_counter()
        parts = codec.encode(value)
        between = time.perf_counter()
        codec.decode(parts, shape[-1], value.dtype)
        seconds[0].append(between - began)
        seconds[1].append(time.perf_counter() - between)
    return 1e3 * statistics.median(seconds[0]), 1e3 * statistics.median(seconds[1])
