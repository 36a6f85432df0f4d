"""``python -m benchmarks codec``: bytes, time and change of loss of every codec, on a real model and real data.

Every codec trains the same client for the same steps, both cuts, both directions, from the same weights; ``off`` is the
reference. Predicted (docs/design.md has the measurements that it rests on): no change beyond ±0.02, with int4 the
largest; 0.5, 0.25 and 0.14 of the bytes; and at most 5 ms to encode and decode the (8, 64, 384) of one message.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.one_client import OneClient, one_client_world, without_dropout
from flexp.config import CodecConfig
from flexp.links.codecs import CODECS
from flexp.machine import machine

VARIANTS = ("off", "fp32", "bf16", "fp16", "int8-channel", "int8-row", "fp8", "int4", "int4+feedback")


def codec_costs(
    model: str = "asset:minilm-l6",
    data: str = "asset:sentiment",
    *,
    variants: Sequence[str] = VARIANTS,
    steps: int = 60,
    batch_size: int = 8,
    max_length: int = 64,
    test_examples: int = 512,
    tuning: str = "full",
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure ``variants``: names of codecs, with ``+feedback`` for error feedback.

    Returns:
        ``rows``: for each its bytes a step, their ratio to the reference's, milliseconds to encode and to decode one
        message, the test loss, its change and the accuracy. The first variant is the reference.
    """
    rows: list[dict[str, Any]] = []
    with without_dropout(model) as (folder, blocks):
        world = one_client_world(
            folder, data, blocks=blocks, steps=steps, batch_size=batch_size, max_length=max_length,
            test_examples=test_examples, tuning=tuning, tail=1,
        )  # fmt: skip
        hidden = world.source.anatomy.hidden
        for variant in variants:
            name, _, feedback = variant.partition("+")
            run = OneClient(world, CodecConfig.all(name, error_feedback=bool(feedback)))  # type: ignore[arg-type]
            for _ in range(steps):
                run.step()
            size = run.bytes() / steps
            scores = run.scores()
            run.method.close()
            first = rows[0] if rows else {"bytes": size, "loss": scores["loss"]}
            encode, decode = _times(name, (batch_size, max_length, hidden))
            rows.append({
                "codec": variant,
                "bytes": size,
                "ratio": size / first["bytes"],
                "encode_ms": encode,
                "decode_ms": decode,
                "loss": scores["loss"],
                "loss_change": scores["loss"] - first["loss"],
                "accuracy": scores["accuracy"],
            })  # fmt: skip
            say(rows[-1])
    return {
        "bench": "codec",
        "model": model,
        "tuning": tuning,
        "steps": steps,
        "batch_size": batch_size,
        "message": [batch_size, max_length, hidden],
        "test_examples": test_examples,
        "rows": rows,
        "machine": machine(),
    }


def _times(name: str, shape: tuple[int, ...], repeats: int = 15) -> tuple[float, float]:
    """Median milliseconds to encode and to decode a float32 tensor."""
    if name == "off":
        return 0.0, 0.0
    codec, value = CODECS[name], torch.randn(shape, generator=torch.Generator().manual_seed(0))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        began = time.perf_counter()
        parts = codec.encode(value)
        between = time.perf_counter()
        codec.decode(parts, shape[-1], value.dtype)
        seconds[0].append(between - began)
        seconds[1].append(time.perf_counter() - between)
    return 1e3 * statistics.median(seconds[0]), 1e3 * statistics.median(seconds[1])
