"""What a client saves whose token embeddings stay in their file, and what it pays.

Memory: a client of one cut and the whole model, both ways, each in a process of its own. Time: a client's own work of
a step, without any server's, both ways in turn. Predicted: the table's bytes less, and 1.00–1.02 of the time, since a
batch reads a few hundred rows, a microsecond or two each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from benchmarks.tools.command import Cut, Examples, Kind, Length, Model, Pairs, Result, Threads, fetched
from benchmarks.tools.paired import paired
from benchmarks.tools.parties import Step, blocks_of, cut_of, probe
from flexp.config import ModelConfig, OptimizerConfig
from flexp.cost.echo import client_model, random_batch
from flexp.cost.probe import Probe
from flexp.cost.probe import measure as peak
from flexp.models.anatomy import Part
from flexp.models.loading import ModelKind, load_stage
from flexp.models.stage import Stage
from flexp.models.stored import token_embedding
from flexp.models.tuning import tune
from flexp.optim import Updater


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Cut = None,
    pairs: Pairs = 20,
    examples: Examples = 8,
    length: Length = 32,
    threads: Threads = 2,
) -> Result:
    """Token embeddings that stay in their file ÷ in memory: a client's peak memory, the whole model's, and a step."""
    folder = fetched(model, threads)
    where = cut_of(cut, blocks_of(folder))
    probes = {
        place: probe(ModelConfig(id=folder, embeddings=place), kind, where, examples, length)
        for place in ("memory", "file")
    }
    stages = {place: _stage(one) for place, one in probes.items()}
    memory, file = (_step(one, stages[place]) for place, one in probes.items())
    timed = paired(memory, file, pairs)
    table = token_embedding(stages["file"].model).weight
    client = {place: peak(one).peak for place, one in probes.items()}
    whole = {place: peak(replace(one, cut=None)).peak for place, one in probes.items()}
    size = table.numel() * table.element_size()
    low, high = timed.quartiles
    facts = {
        "model": model, "cut": list(where), "batch": [examples, length], "table_bytes": size, "client": client,
        "whole": whole, "pairs": pairs,
    }  # fmt: skip
    rows = [
        ("the table", f"{size / 1e6:.1f} MB"),
        ("a client: memory, file", f"{client['memory'] / 1e6:.1f}, {client['file'] / 1e6:.1f} MB"),
        ("the whole model: memory, file", f"{whole['memory'] / 1e6:.1f}, {whole['file'] / 1e6:.1f} MB"),
        ("client with file ÷ whole in memory", f"{100 * client['file'] / whole['memory']:.1f} %"),
        ("client ÷ whole, both with file", f"{100 * client['file'] / whole['file']:.1f} %"),
        ("a client's own step: file ÷ memory", f"{timed.ratio:.3f} ({low:.3f} – {high:.3f})"),
        ("in memory; in the file", f"{1e3 * timed.first:.1f}; {1e3 * timed.second:.1f} ms"),
    ]
    return Result(facts | timed.facts("memory", "file"), rows)


def _stage(of: Probe) -> Stage:
    assert of.cut is not None
    config = ModelConfig(**of.model_config)
    stage = load_stage(
        config, cast(ModelKind, of.kind), Part.client(of.cut, blocks_of(of.model)), labels=of.labels, pad_token_id=0
    )
    tune(stage, config)
    return stage


def _step(of: Probe, stage: Stage) -> Step:
    batch: dict[str, Any] = random_batch(of, stage.model.config)
    model = client_model(of, stage).train()
    updater = Updater(stage.trainable(), OptimizerConfig())

    def step() -> None:
        model(**batch).loss.backward()
        updater.step()
        model.after_step()

    return step
