"""What codecs and overlap give on a slow network, emulated in this process.

Two runs of equal seed on equal data alternate step by step: *plain* sends float32, the whole batch in one exchange, and
waits; *fast* sends another codec and has several exchanges of a step under way. Predicted for a round trip of 50 ms
and 20 Mbit/s, with a model of 2 blocks on one core: 5.5. A token is 4 messages of 384 numbers: 2.5 ms in float32, one
after the other, and 0.3 ms each way in int8, both ways at once; the computing of 0.3–0.4 ms is the same.

The first ``timed`` steps are over the network. The rest, which make the loss one that means something, are over the
links without it: it changes no number. With ``frozen`` the faster run leaves its block as it came and both have been
through all examples once before (without the network), so that it says their numbers alone.

``hidden`` emulates a wider model: a message of H = 384 over a network slower by 384 ÷ ``hidden`` takes as long as one
of that width. Computing stays that of the small model.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

from benchmarks.tools.command import Data, Encoder, Examples, Length, Result, Tests, Threads, Tuning, say
from benchmarks.tools.one_client import OneClient, check_codec, frozen_head, one_client_world, without_dropout
from flexp.config import CodecConfig
from flexp.links.base import Link
from flexp.links.emulated import EmulatedLink, Network


def measure(
    model: Encoder = "asset:minilm-l6",
    data: Data = "asset:sentiment",
    blocks: Annotated[int, typer.Option(min=2, help="Only so many of the model's first blocks.")] = 2,
    round_trip: Annotated[float, typer.Option(min=0.0, help="Milliseconds.")] = 50.0,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="Mbit/s, each way.")] = 20.0,
    jitter: Annotated[float, typer.Option(min=0.0, help="Milliseconds, at most, of a message.")] = 0.0,
    codec: Annotated[str, typer.Option(help="Of the faster run.")] = "int8-row",
    in_flight: Annotated[int, typer.Option(min=1, help="Exchanges under way, of the faster run.")] = 4,
    timed: Annotated[int, typer.Option(min=4, help="Steps over the network, which are timed.")] = 20,
    steps: Annotated[int, typer.Option(min=4, help="Steps in all; those that remain are not over the network.")] = 120,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="The faster run's block stays as it came; all examples have been sent.")
    ] = False,
    hidden: Annotated[int | None, typer.Option(min=1, help="As if activations were so wide.")] = None,
    batch_size: Examples = 32,
    max_length: Length = 64,
    test_examples: Tests = 512,
    tuning: Tuning = "full",
    threads: Threads = 1,
) -> Result:
    """Steps with a codec and several exchanges under way ÷ plain float32 ones, on a slow network that is emulated."""
    fast = CodecConfig.all(check_codec(codec))
    torch.set_num_threads(threads)
    bps = 1e6 * bandwidth * (384 / hidden if hidden else 1.0)
    network = Network(latency_s=round_trip / 2e3, jitter_s=jitter / 1e3, uplink_bps=bps, downlink_bps=bps)
    with without_dropout(model, blocks) as (folder, count):
        world = one_client_world(
            folder, data, blocks=count, steps=timed if frozen else steps, batch_size=batch_size, max_length=max_length,
            test_examples=test_examples, tuning=tuning, lr=5e-4, new_lr=2e-3,
        )  # fmt: skip
        inner: list[Link] = []

        def wrap(link: Link) -> Link:
            inner.append(link)
            return EmulatedLink(link, network)

        faster = frozen_head(world, 2) if frozen else world
        runs = [OneClient(world, CodecConfig.all("fp32"), 1, wrap), OneClient(faster, fast, in_flight, wrap)]
        if frozen:
            for run, link in zip(runs, inner, strict=True):
                with run.over(link):
                    for _ in range(timed):
                        run.step()
        before = [run.bytes() for run in runs]
        seconds: list[list[float]] = [[], []]
        for number in range(min(timed, steps)):
            for index in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                loss = runs[index].step()
                seconds[index].append(time.perf_counter() - began)
            say(f"step {number + 1}: {seconds[0][-1]:.2f} and {seconds[1][-1]:.2f} s, loss {loss:.3f}")
        sizes = [(run.bytes() - had) / min(timed, steps) for run, had in zip(runs, before, strict=True)]
        scores = []
        for run, link in zip(runs, inner, strict=True):
            with run.over(link):
                for _ in range(timed, steps):
                    run.step()
                scores.append(run.scores())
            run.method.close()
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*seconds, strict=True)], n=4)
    plain_s, fast_s = map(statistics.median, seconds)
    change = scores[1]["loss"] - scores[0]["loss"]
    facts = {
        "model": model, "blocks": count, "network": vars(network) | {"round_trip_s": 2 * network.latency_s},
        "codec": codec, "in_flight": in_flight, "frozen": frozen, "hidden": hidden, "batch_size": batch_size,
        "tuning": tuning, "steps": steps,
        "timed": timed, "ratio": middle, "ratio_quartiles": [low, high],
        "total_ratio": sum(seconds[0]) / sum(seconds[1]), "plain_seconds": plain_s, "fast_seconds": fast_s,
        "plain_bytes": sizes[0], "fast_bytes": sizes[1], "plain_loss": scores[0]["loss"],
        "fast_loss": scores[1]["loss"], "accuracy": [score["accuracy"] for score in scores], "loss_change": change,
    }  # fmt: skip
    rows = [
        ("steps a second: fast ÷ plain (median of pairs)", f"{middle:.2f}"),
        ("quartiles", f"{low:.2f} – {high:.2f}"),
        ("plain step (float32, one exchange)", f"{plain_s:.2f} s, {sizes[0]:,.0f} bytes"),
        (f"fast step ({codec}, {in_flight} under way)", f"{fast_s:.2f} s, {sizes[1]:,.0f} bytes"),
        ("test loss: plain, fast", f"{scores[0]['loss']:.4f}, {scores[1]['loss']:.4f}"),
        ("change", f"{change:+.4f}"),
        ("test accuracy: plain, fast", ", ".join(f"{100 * score['accuracy']:.1f} %" for score in scores)),
    ]
    return Result(facts, rows)
