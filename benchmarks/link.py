"""What a network link costs when the network itself costs nothing.

A step over gRPC on this machine's loopback and one over the in-process link alternate on equal batches. Both sides of
the link are in this process and share its interpreter lock, which makes gRPC look slower than between two machines.
Predicted: 1.02–1.10 at H = 384, since the four messages of a step are small beside its matrix products.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks.tools.command import Cut, Dtype, Examples, Kind, Length, Model, Pairs, Result, Threads, Tuning, fetched
from benchmarks.tools.paired import paired
from benchmarks.tools.parties import parties
from flexp.config import OptimizerConfig
from flexp.links.opening import loopback
from flexp.server import Server


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Cut = None,
    pairs: Pairs = 12,
    tuning: Tuning = "full",
    dtype: Dtype = "float32",
    examples: Examples = 8,
    length: Length = 32,
    threads: Threads = 1,
) -> Result:
    """A step over gRPC on this machine ÷ one inside the process, and the bytes that one step sends."""
    here = parties(
        fetched(model, threads), kind, cut, examples=examples, length=length, tuning=tuning, dtype=dtype,
        optimizer=OptimizerConfig(clip=None),
    )  # fmt: skip
    with ExitStack() as stack:
        links: list[Any] = []

        def reach(server: Server) -> Any:
            links.append(stack.enter_context(loopback(server, "bench")))
            return links[0]

        near, far = here.split_step(), here.split_step(reach)
        far()  # the first step makes what later ones find
        traffic = links[0].meter.training
        before, other = traffic.bytes_up + traffic.bytes_down, sum(links[0].header_bytes)
        far()
        tensors = traffic.bytes_up + traffic.bytes_down - before
        headers = sum(links[0].header_bytes) - other
        timed = paired(near, far, pairs)
    facts = {
        "model": model, "hidden": here.source.anatomy.hidden, "cut": list(here.cut), "tuning": tuning, "dtype": dtype,
        "batch": [examples, length], "pairs": pairs, "tensor_bytes": tensors, "header_bytes": headers,
    }  # fmt: skip
    rows = [*timed.rows("in-process", "gRPC"), ("bytes of a step", f"{tensors} of tensors, {headers} besides")]
    return Result(facts | timed.facts("in_process", "grpc"), rows)
