"""How one server does with more and more clients.

The server and its clients are in this process, every client in a thread of its own with a link over gRPC on the
loopback; each is scored by the steps that it gets through in a fixed time. The reference is the same number of clients
over in-process links, one after the other. A step is all of it: the client's blocks, the link, the server's blocks and
the updates of both.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from benchmarks.tools.command import Examples, Kind, Length, Model, Result, Threads, fetched, say
from benchmarks.tools.parties import Parties, Step, at_once, parties
from flexp.config import CodecConfig, OptimizerConfig, ServerConfig
from flexp.links.base import Link
from flexp.links.grpc import connect, serve

SGD = OptimizerConfig(name="sgd", lr=1e-4, weight_decay=0.0, clip=None)
COLUMNS = ("clients", "tokens/s", "in process", "ratio", "p50 ms", "p90 ms", "p99 ms", "memory MB", "versions")


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    counts: Annotated[str, typer.Option(help="How many clients, with commas.")] = "1,2,4,8,16",
    seconds: Annotated[float, typer.Option(min=0.5, help="For each.")] = 10.0,
    examples: Examples = 8,
    length: Length = 32,
    threads: Threads = 1,
) -> Result:
    """Tokens a second, latency and memory of one server with 1 to 16 clients, against in-process clients in turn."""
    here = parties(fetched(model, threads), kind, examples=examples, length=length)
    found, rows, tokens = [], [], examples * length
    for count in map(int, counts.split(",")):
        near, far = in_process(here, count, seconds), over_grpc(here, count, seconds)
        row = {"clients": count, "ratio": far["steps"] / near, "tokens_per_second": far["steps"] * tokens} | far
        row["in_process_tokens_per_second"] = near * tokens
        say(f"{count} clients: {row['ratio']:.3f}")
        found.append(row)
        rows.append([
            str(count), f"{row['tokens_per_second']:.0f}", f"{near * tokens:.0f}", f"{row['ratio']:.2f}",
            *(f"{1e3 * row[key]:.0f}" for key in ("p50_seconds", "p90_seconds", "p99_seconds")),
            f"{row['memory_bytes'] / 1e6:.0f}", str(row["peak_versions"]),
        ])  # fmt: skip
    facts = {
        "model": model, "hidden": here.source.anatomy.hidden, "cut": list(here.cut), "batch": [examples, length],
        "seconds": seconds, "rows": found,
    }  # fmt: skip
    return Result(facts, rows, COLUMNS)


def over_grpc(here: Parties, count: int, seconds: float, config: ServerConfig | None = None) -> dict[str, Any]:
    """Steps a second of ``count`` clients, each in a thread of its own over gRPC; and how long they take."""
    server = here.server(config)
    times: list[list[float]] = [[] for _ in range(count)]
    with ExitStack() as stack:
        serving = stack.enter_context(serve(server))
        links = [connect(f"grpc://{serving.address}", f"client-{number}") for number in range(count)]
        for link in links:
            stack.callback(link.close)
        steps = [_step(here, link) for link in links]

        def work(number: int, ready: threading.Barrier, stop: threading.Event) -> None:
            steps[number]()
            ready.wait()
            while not stop.is_set():
                began = time.perf_counter()
                steps[number]()
                times[number].append(time.perf_counter() - began)

        passed = at_once(work, count, seconds)
    every = [value for own in times for value in own]
    middle, ninth, last = np.percentile(every, [50, 90, 99])
    return {
        "steps": len(every) / passed, "p50_seconds": float(middle), "p90_seconds": float(ninth),
        "p99_seconds": float(last), "fewest_steps": min(map(len, times)), "most_steps": max(map(len, times)),
        "peak_versions": server.shared.peak_versions, "memory_bytes": psutil.Process().memory_info().rss,
    }  # fmt: skip


def in_process(here: Parties, count: int, seconds: float) -> float:
    """Steps a second of ``count`` clients in turn."""
    server = here.server()
    steps = [_step(here, server.connect(f"client-{number}")) for number in range(count)]
    for step in steps:
        step()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        steps[done % count]()
        done += 1
    return done / (time.perf_counter() - began)


def _step(here: Parties, link: Link) -> Step:
    client = here.client(link, codec=CodecConfig())
    return here.step(client.stage, client, SGD)
