"""``python -m benchmarks server-scaling``: how one server does with more and more clients.

The server and its clients are in this process, every client in a thread of its own with a link over gRPC on the
loopback; each is scored by the steps that it gets through in a fixed time. The reference is the same number of clients
over in-process links, one after the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import numpy as np
import psutil
import torch

from flexp.client.model import SPLIT_MODELS, SplitModel
from flexp.config import CodecConfig, ModelConfig
from flexp.cost.echo import random_batch
from flexp.cost.probe import Probe
from flexp.links.base import Link
from flexp.links.grpc import connect, serve
from flexp.machine import machine
from flexp.models.loading import ModelKind, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.server import Server

EXACT = CodecConfig()


def server_scaling(
    model: str,
    kind: str = "sequence-classification",
    *,
    cut: tuple[int, int | None] = (1, None),
    counts: Sequence[int] = (1, 2, 4, 8, 16),
    seconds: float = 10.0,
    examples: int = 8,
    length: int = 32,
    say: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """For each of ``counts``: tokens a second of all clients together, the percentiles of a step's time, and memory.

    Every client has a whole step in the clock: its own blocks, the link, the server's blocks and its updates.
    """
    labels = None if kind == "causal-lm" else ["a", "b"]
    source = load_stage(model, cast(ModelKind, kind), labels=labels, pad_token_id=0)
    where = check_cut(cut, source.anatomy.blocks)
    batch = random_batch(Probe(model, kind, where, examples, length, labels, {}, {}), source.model.config)
    rows = []
    for count in counts:
        near = _in_process(source, kind, where, count, batch, seconds)
        row = _over_grpc(source, kind, where, count, batch, seconds)
        tokens = examples * length
        row = {"clients": count, "ratio": row["steps"] / near, "tokens_per_second": row["steps"] * tokens} | row
        row["in_process_tokens_per_second"] = near * tokens
        say(row)
        rows.append(row)
    facts = {"model": model, "hidden": source.anatomy.hidden, "cut": list(where), "batch": [examples, length]}
    return {"bench": "server-scaling", **facts, "seconds": seconds, "rows": rows, "machine": machine()}


def _over_grpc(
    source: Stage, kind: str, cut: tuple[int, int], count: int, batch: dict[str, Any], seconds: float
) -> dict[str, Any]:
    server = _server(source, cut)
    times: list[list[float]] = [[] for _ in range(count)]
    stop, ready = threading.Event(), threading.Barrier(count + 1)
    with ExitStack() as stack:
        serving = stack.enter_context(serve(server))
        links = [connect(f"grpc://{serving.address}", f"client-{number}") for number in range(count)]
        for link in links:
            stack.callback(link.close)
        models = [_client(source, kind, cut, link) for link in links]

        def work(number: int) -> None:
            _step(models[number], batch)
            ready.wait()
            while not stop.is_set():
                began = time.perf_counter()
                _step(models[number], batch)
                times[number].append(time.perf_counter() - began)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        began = time.perf_counter()
        time.sleep(seconds)
        stop.set()
        for thread in threads:
            thread.join()
        passed = time.perf_counter() - began
    every = [value for own in times for value in own]
    low, middle, high = np.percentile(every, [50, 90, 99])
    return {
        "steps": len(every) / passed,
        "p50_seconds": float(low),
        "p90_seconds": float(middle),
        "p99_seconds": float(high),
        "fewest_steps": min(map(len, times)),
        "most_steps": max(map(len, times)),
        "peak_versions": server.shared.peak_versions,
        "memory_bytes": psutil.Process().memory_info().rss,
    }


def _in_process(
    source: Stage, kind: str, cut: tuple[int, int], count: int, batch: dict[str, Any], seconds: float
) -> float:
    """Steps a second of ``count`` clients in turn."""
    server = _server(source, cut)
    models = [_client(source, kind, cut, server.connect(f"client-{number}")) for number in range(count)]
    for model in models:
        _step(model, batch)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        _step(models[done % count], batch)
        done += 1
    return done / (time.perf_counter() - began)


def _server(source: Stage, cut: tuple[int, int]) -> Server:
    stage = carve(source, Part.server(*cut))
    tune(stage, ModelConfig(id="any"))
    return Server(stage)


def _client(source: Stage, kind: str, cut: tuple[int, int], link: Link) -> SplitModel:
    stage = carve(source, Part.client(cut, source.anatomy.blocks))
    tune(stage, ModelConfig(id="any"))
    return SPLIT_MODELS[kind](stage, cut, link, codec=EXACT, expose_embeddings=True).train()


def _step(model: SplitModel, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.stage.trainable().values():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-1e-4)
                parameter.grad = None
