"""``python -m benchmarks link``: what a network link costs when the network itself costs nothing.

A step over gRPC on this machine's loopback and one over the in-process link alternate on equal batches. Both sides of
the link are in this process and share its interpreter lock, which makes gRPC look slower than between two machines.
Predicted: 1.02–1.10 at H = 384, since the four messages of a step are small beside its matrix products.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

from benchmarks.overhead import split_step
from benchmarks.paired import paired
from flexp.config import ModelConfig, OptimizerConfig
from flexp.cost.echo import random_batch
from flexp.cost.probe import Probe
from flexp.links.opening import loopback
from flexp.machine import machine
from flexp.models.loading import ModelKind, load_stage
from flexp.models.parts import check_cut


def link_overhead(
    model: str,
    kind: str = "sequence-classification",
    *,
    cut: tuple[int, int | None] | None = None,
    examples: int = 8,
    length: int = 32,
    pairs: int = 12,
    tuning: str = "full",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Time ``pairs`` of steps (forward, backward, update), over gRPC and in process in turn.

    Returns:
        ``ratio``: the median of gRPC ÷ in-process over the pairs, with its quartiles, the seconds of either, and the
        bytes of tensors and of everything else that one step sends.
    """
    labels = None if kind == "causal-lm" else ["a", "b"]
    source = load_stage(ModelConfig.of(model, dtype=dtype), cast(ModelKind, kind), labels=labels, pad_token_id=0)
    where = check_cut(cut or (1, None), source.anatomy.blocks)
    batch = random_batch(Probe(model, kind, where, examples, length, labels, {}, {}), source.model.config)
    optimizer = OptimizerConfig(clip=None)
    with ExitStack() as stack:
        near = split_step(source, kind, where, tuning, optimizer, batch, lambda server: server.connect("bench"))
        links: list[Any] = []

        def reach(server: Any) -> Any:
            links.append(stack.enter_context(loopback(server, "bench")))
            return links[0]

        far = split_step(source, kind, where, tuning, optimizer, batch, reach)
        far()  # the first step makes what later ones find
        traffic = links[0].meter.training
        before, other = traffic.bytes_up + traffic.bytes_down, sum(links[0].header_bytes)
        far()
        tensors = traffic.bytes_up + traffic.bytes_down - before
        headers = sum(links[0].header_bytes) - other
        timed = paired(near, far, pairs)
    return {
        "bench": "link",
        "model": model,
        "hidden": source.anatomy.hidden,
        "cut": list(where),
        "tuning": tuning,
        "dtype": dtype,
        "batch": [examples, length],
        "pairs": pairs,
        "ratio": timed.ratio,
        "ratio_quartiles": timed.quartiles,
        "in_process_seconds": timed.first,
        "grpc_seconds": timed.second,
        "tensor_bytes": tensors,
        "header_bytes": headers,
        "machine": machine(),
    }
