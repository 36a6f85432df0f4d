"""``python -m benchmarks simulated-clients``: what a client costs in a simulation of 1 to 100 of them.

Simulated LoRA clients share the frozen model, so each should cost its adapters, their optimiser state and some empty
modules. Predicted: memory grows by about 12 bytes per personal parameter (fp32 weight and two Adam moments) plus about
a megabyte of Python objects per client, whatever the size of the model.
"""

from __future__ import annotations

import gc
import time
from typing import Any, cast

import psutil

from flexp.client.model import SPLIT_MODELS
from flexp.config import LoraConfig, ModelConfig, OptimizerConfig
from flexp.cost.echo import random_batch
from flexp.cost.probe import Probe
from flexp.machine import machine
from flexp.models.loading import ModelKind, load_stage
from flexp.models.parts import Part
from flexp.models.stage import carve
from flexp.models.tuning import tune
from flexp.optim import Updater
from flexp.server import Server


def simulated_clients(
    model: str,
    kind: str = "sequence-classification",
    *,
    counts: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100),
    rank: int = 8,
    examples: int = 4,
    length: int = 32,
) -> dict[str, Any]:
    """Make clients up to each of ``counts``, let each train for one step, and read the process's memory.

    Returns:
        ``rows``: per count, resident bytes above those before the first client, seconds to make the new clients and
        seconds per step; ``bytes_per_client``: the slope between the first and the last row; ``model_bytes``.
    """
    labels = None if kind == "causal-lm" else ["a", "b"]
    source = load_stage(model, cast(ModelKind, kind), labels=labels, pad_token_id=0)
    blocks = source.anatomy.blocks
    model_bytes = sum(value.numel() * value.element_size() for value in source.model.parameters())
    for value in source.model.parameters():  # mapped from the file: read once, so that it does not count for clients
        value.detach().sum()
    lora, optimizer = LoraConfig(rank=rank), OptimizerConfig()
    shared = carve(source, Part.server(1, blocks))
    tune(shared, ModelConfig(id="any", tuning="lora", lora=lora))
    server = Server(shared, tuning="lora", optimizer=optimizer)
    batch = random_batch(Probe(model, kind, None, examples, length, labels, {}, {}), source.model.config)
    clients: list[tuple[Any, Updater]] = []

    def add() -> None:
        # Cuts alternate between s = 1, 2, 3 where the model is deep enough.
        cut = (1 + len(clients) % min(3, blocks - 1), blocks)
        stage = carve(source, Part.client(cut, blocks))
        tune(stage, ModelConfig(id="any", tuning="lora", lora=lora))
        link = server.connect(f"client-{len(clients)}")
        split = SPLIT_MODELS[kind](stage, cut, link, tuning="lora", expose_embeddings=True).train()
        clients.append((split, Updater(stage.trainable(), optimizer)))

    def step(split: Any, updater: Updater) -> None:
        split(**batch).loss.backward()
        updater.step()

    add()
    step(*clients[0])  # what the first step allocates once is not a client's cost
    clients.clear()
    before = _resident()
    rows = []
    for count in counts:
        began = time.perf_counter()
        new = len(clients)
        while len(clients) < count:
            add()
        made = time.perf_counter() - began
        began = time.perf_counter()
        for split, updater in clients[new:]:
            step(split, updater)
        stepped = (time.perf_counter() - began) / max(1, count - new)
        rows.append({"clients": count, "bytes": _resident() - before, "making_seconds": made, "step_seconds": stepped})
    first, last = rows[0], rows[-1]
    personal = [sum(value.numel() for value in split.personal_state().values()) for split, _ in clients]
    span = max(1, counts[-1] - counts[0])
    return {
        "bench": "simulated-clients",
        "model": model,
        "model_bytes": model_bytes,
        "rank": rank,
        "personal_parameters": sum(personal) / len(personal),
        "rows": rows,
        "bytes_per_client": (last["bytes"] - first["bytes"]) / span,
        "machine": machine(),
    }


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
