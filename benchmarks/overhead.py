"""``python -m benchmarks split-overhead``: what splitting costs when nothing has to travel.

Whole and split steps alternate in one process on equal batches, so that the ratio does not depend on how busy the
machine is. Predicted: 1.00–1.02, since every block does the same work and a plan costs less than a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from benchmarks.paired import paired
from flexp.client.model import SPLIT_MODELS
from flexp.config import LoraConfig, ModelConfig, OptimizerConfig
from flexp.cost.echo import random_batch
from flexp.cost.probe import Probe
from flexp.links.base import Link
from flexp.machine import machine
from flexp.models.loading import ModelKind, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import carve
from flexp.models.tuning import tune
from flexp.optim import Updater
from flexp.server import Server


def split_overhead(
    model: str,
    kind: str = "sequence-classification",
    *,
    cut: tuple[int, int | None] | None = None,
    examples: int = 8,
    length: int = 64,
    pairs: int = 20,
    tuning: str = "full",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Time ``pairs`` of steps (forward, backward, update), whole and split in turn.

    Returns:
        ``ratio``: the median of split ÷ whole over the pairs, with its quartiles and the seconds of either.
    """
    labels = None if kind == "causal-lm" else ["a", "b"]
    source = load_stage(ModelConfig.of(model, dtype=dtype), cast(ModelKind, kind), labels=labels, pad_token_id=0)
    blocks = source.anatomy.blocks
    where = check_cut(cut or (1, None), blocks)
    batch = random_batch(Probe(model, kind, where, examples, length, labels, {}, {}), source.model.config)
    optimizer = OptimizerConfig(clip=None)
    whole_step = _whole(source, tuning, optimizer, batch)
    halves = split_step(source, kind, where, tuning, optimizer, batch, lambda server: server.connect("bench"))
    timed = paired(whole_step, halves, pairs)
    return {
        "bench": "split-overhead",
        "model": model,
        "cut": list(where),
        "tuning": tuning,
        "dtype": dtype,
        "batch": [examples, length],
        "pairs": pairs,
        "ratio": timed.ratio,
        "ratio_quartiles": timed.quartiles,
        "whole_seconds": timed.first,
        "split_seconds": timed.second,
        "machine": machine(),
    }


def _whole(source: Any, tuning: Any, optimizer: OptimizerConfig, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    stage = carve(source, Part.whole(source.anatomy.blocks))
    tune(stage, ModelConfig.of("any", tuning=tuning))
    updater = Updater(stage.trainable(), optimizer)
    stage.model.train()

    def step() -> None:
        stage.model(**batch).loss.backward()
        updater.step()

    return step


def split_step(
    source: Any,
    kind: str,
    cut: tuple[int, int],
    tuning: Any,
    optimizer: OptimizerConfig,
    batch: dict[str, torch.Tensor],
    reach: Callable[[Server], Link],
    *,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
) -> Callable[[], None]:
    """One training step of a client and a server carved out of ``source``; ``reach`` makes the link between them."""
    client, shared = carve(source, Part.client(cut, source.anatomy.blocks)), carve(source, Part.server(*cut))
    config = ModelConfig.of(
        "any", tuning=tuning, lora=lora or LoraConfig(), gradient_checkpointing=gradient_checkpointing
    )
    for stage in (client, shared):
        tune(stage, config)
    server = Server(shared, tuning=tuning, optimizer=optimizer)
    model = SPLIT_MODELS[kind](client, cut, reach(server), tuning=tuning, expose_embeddings=True).train()
    updater = Updater(client.trainable(), optimizer)

    def step() -> None:
        model(**batch).loss.backward()
        updater.step()

    return step
