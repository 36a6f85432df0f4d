"""``python -m benchmarks slow-link``: what codecs and overlap give on a slow network, emulated in this process.

Two runs of equal seed on equal data alternate step by step: *plain* sends float32, the whole batch in one exchange, and
waits; *fast* sends another codec and has several exchanges of a step under way. Predicted for a round trip of 50 ms
and 20 Mbit/s, with a model of 2 blocks on one core: 5.5. A token is 4 messages of 384 numbers: 2.5 ms in float32, one
after the other, and 0.3 ms each way in int8, both ways at once; the computing of 0.3–0.4 ms is the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.one_client import OneClient, one_client_world, without_dropout
from flexp.config import CodecConfig, CodecName
from flexp.links.base import Link
from flexp.links.emulated import EmulatedLink, Network
from flexp.machine import machine


def slow_link(
    model: str = "asset:minilm-l6",
    data: str = "asset:sentiment",
    *,
    network: Network,
    codec: CodecName = "int8-row",
    in_flight: int = 4,
    blocks: int | None = 2,
    steps: int = 120,
    timed: int = 20,
    batch_size: int = 32,
    max_length: int = 64,
    test_examples: int = 512,
    tuning: str = "full",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train both runs for ``steps`` and score them on the same test examples.

    The first ``timed`` steps are over the network. The rest, which make the loss one that means something, are over the
    links without it: it changes no number.

    Returns:
        ``ratio``: the median over the steps of plain ÷ fast seconds, with its quartiles; the seconds, bytes a step,
        and test losses of either, and ``loss_change``, fast − plain.
    """
    with without_dropout(model, blocks) as (folder, count):
        world = one_client_world(
            folder, data, blocks=count, steps=steps, batch_size=batch_size, max_length=max_length,
            test_examples=test_examples, tuning=tuning, lr=5e-4, new_lr=2e-3,
        )  # fmt: skip
        inner: list[Link] = []

        def wrap(link: Link) -> Link:
            inner.append(link)
            return EmulatedLink(link, network)

        runs = [
            OneClient(world, CodecConfig.all("fp32"), 1, wrap),
            OneClient(world, CodecConfig.all(codec), in_flight, wrap),
        ]
        seconds: list[list[float]] = [[], []]
        for number in range(min(timed, steps)):
            for index in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                loss = runs[index].step()
                seconds[index].append(time.perf_counter() - began)
            say(f"step {number + 1}: {seconds[0][-1]:.2f} and {seconds[1][-1]:.2f} s, loss {loss:.3f}")
        sizes = [run.bytes() / min(timed, steps) for run in runs]
        scores = []
        for run, link in zip(runs, inner, strict=True):
            with run.over(link):
                for _ in range(timed, steps):
                    run.step()
                scores.append(run.scores())
            run.method.close()
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*seconds, strict=True)], n=4)
    return {
        "bench": "slow-link",
        "model": model,
        "blocks": count,
        "network": vars(network) | {"round_trip_s": 2 * network.latency_s},
        "codec": codec,
        "in_flight": in_flight,
        "batch_size": batch_size,
        "tuning": tuning,
        "steps": steps,
        "timed": timed,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "total_ratio": sum(seconds[0]) / sum(seconds[1]),
        "plain_seconds": statistics.median(seconds[0]),
        "fast_seconds": statistics.median(seconds[1]),
        "plain_bytes": sizes[0],
        "fast_bytes": sizes[1],
        "plain_loss": scores[0]["loss"],
        "fast_loss": scores[1]["loss"],
        "accuracy": [score["accuracy"] for score in scores],
        "loss_change": scores[1]["loss"] - scores[0]["loss"],
        "machine": machine(),
    }
