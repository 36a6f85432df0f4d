"""``python -m benchmarks embeddings``: what a client saves whose token embeddings stay in their file, and what it pays.

Memory: a client of one cut and the whole model, both ways, each in a process of its own. Time: a client's own work of
a step, without any server's, both ways in turn. Predicted: the table's bytes less, and 1.00–1.02 of the time, since a
batch reads a few hundred rows, a microsecond or two each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from benchmarks.paired import paired
from flexp.config import ModelConfig, OptimizerConfig
from flexp.cost.echo import client_model, random_batch
from flexp.cost.probe import Probe, measure
from flexp.machine import machine
from flexp.models.loading import ModelKind, load_config, load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage
from flexp.models.stored import token_embedding
from flexp.models.tuning import tune
from flexp.optim import Updater


def embeddings(
    model: str,
    kind: str = "sequence-classification",
    *,
    cut: tuple[int, int | None] = (1, None),
    examples: int = 8,
    length: int = 32,
    pairs: int = 20,
) -> dict[str, Any]:
    """Measure full tuning of a client with ``cut`` and of the whole model, with embeddings in memory and in their file.

    Returns:
        ``client`` and ``whole``: peak bytes by ``memory`` and ``file``; ``table_bytes``: of the embeddings; ``ratio``:
        the median of a client's step with them in the file ÷ in memory over the pairs, with its quartiles.
    """
    labels = None if kind == "causal-lm" else ["a", "b"]
    whole_cut = check_cut(cut, int(load_config(model).get_text_config().num_hidden_layers))
    probe = Probe(model, kind, whole_cut, examples, length, labels, {}, {})
    probes = {where: _with(probe, where) for where in ("memory", "file")}
    stages = {where: _stage(one) for where, one in probes.items()}
    steps = [_step(one, stages[where]) for where, one in probes.items()]
    timed = paired(steps[0], steps[1], pairs)
    table = token_embedding(stages["file"].model).weight
    return {
        "bench": "embeddings",
        "model": model,
        "cut": list(whole_cut),
        "batch": [examples, length],
        "table_bytes": table.numel() * table.element_size(),
        "client": {where: measure(one).peak for where, one in probes.items()},
        "whole": {where: measure(replace(one, cut=None)).peak for where, one in probes.items()},
        "pairs": pairs,
        "ratio": timed.ratio,
        "ratio_quartiles": timed.quartiles,
        "memory_seconds": timed.first,
        "file_seconds": timed.second,
        "machine": machine(),
    }


def _with(probe: Probe, where: str) -> Probe:
    config = ModelConfig.model_validate({"id": probe.model, "embeddings": where})
    return replace(
        probe, model_config=config.model_dump(mode="json"), optimizer=OptimizerConfig().model_dump(mode="json")
    )


def _stage(probe: Probe) -> Stage:
    assert probe.cut is not None
    blocks = int(load_config(probe.model).get_text_config().num_hidden_layers)
    stage = load_stage(
        ModelConfig(**probe.model_config),
        cast(ModelKind, probe.kind),
        Part.client(probe.cut, blocks),
        labels=probe.labels,
        pad_token_id=0,
    )
    tune(stage, ModelConfig(id="any"))
    return stage


def _step(probe: Probe, stage: Stage) -> Callable[[], None]:
    batch = random_batch(probe, stage.model.config)
    model = client_model(probe, stage).train()
    updater = Updater(stage.trainable(), OptimizerConfig())

    def step() -> None:
        model(**batch).loss.backward()
        updater.step()
        model.after_step()

    return step
