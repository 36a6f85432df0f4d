"""``python -m benchmarks predict``: predicted against measured, peak memory and step time, over architectures and cuts.

Models of random weights, large enough for a step to take half a second, are written to a temporary folder. This machine
is profiled on each (:mod:`flexp.cost.measure`), which looks at two blocks and at a client of cut (1, L); every cut
that is then compared is another one. Memory is the peak of a client in a process of its own
(:mod:`flexp.cost.probe`). Time is a whole step in one process, client and server without a network, and the
client's alone, with a link that answers at once: the shortest of several, of the process's own seconds. Expected: all
within 15 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import transformers

from benchmarks.overhead import split_step
from flexp.config import ModelConfig, OptimizerConfig
from flexp.cost.choice import Choice
from flexp.cost.echo import client_model, random_batch
from flexp.cost.measure import clock, flops_per_second, measure_model
from flexp.cost.model_cost import model_cost
from flexp.cost.predict import predict
from flexp.cost.probe import Probe, measure
from flexp.cost.profile import Profile
from flexp.machine import machine
from flexp.models.loading import AUTO, ModelKind, load_stage, quietly
from flexp.models.parts import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.optim import Updater

VOCABULARY = 4096

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": (
        "sequence-classification",
        lambda: transformers.BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6, vocab_size=VOCABULARY
        ),
    ),
    "llama": (
        "causal-lm",
        lambda: transformers.LlamaConfig(
            hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5,
            vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        ),
    ),
    "gpt2": (
        "causal-lm",
        lambda: transformers.GPT2Config(
            n_embd=256, n_layer=12, n_head=4, vocab_size=VOCABULARY, n_positions=512, bos_token_id=0, eos_token_id=0
        ),
    ),
}  # fmt: skip
"""Kind and configuration of what is measured, by name."""


def cuts_of(blocks: int) -> list[tuple[int, int]]:
    """Five cuts from shallow to deep, none of them the one that a profile measures."""
    return [(1, blocks - 1), (2, blocks), (blocks // 2, blocks - 1), (blocks - 3, blocks - 2), (blocks - 1, blocks)]


def predictions(
    *,
    models: Sequence[str] = tuple(MODELS),
    examples: int = 8,
    length: int = 64,
    tuning: str = "full",
    rank: int = 8,
    checkpointing: bool = False,
    repeats: int = 10,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Predict and measure every model and cut.

    Returns:
        ``rows``: of each the model, cut, and (predicted, measured) of ``memory_bytes``, ``client_seconds`` and
        ``seconds`` (client and server); ``worst``: the largest error of each of them, as a share of what was measured.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        with tempfile.TemporaryDirectory(prefix="flexp-bench-") as folder:
            rows += _model(
                name, folder, examples, length, rank if tuning == "lora" else None, checkpointing, repeats, say
            )
    keys = ("memory_bytes", "client_seconds", "seconds")
    return {
        "bench": "predict",
        "batch": [examples, length],
        "tuning": tuning,
        "checkpointing": checkpointing,
        "rows": rows,
        "worst": {key: max(abs(error(row[key])) for row in rows) for key in keys},
        "machine": machine(),
    }


def error(pair: Sequence[float]) -> float:
    """(predicted − measured) ÷ measured."""
    return (pair[0] - pair[1]) / pair[1]


def _model(
    name: str,
    folder: str,
    examples: int,
    length: int,
    rank: int | None,
    checkpointing: bool,
    repeats: int,
    say: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    kind, configuration = MODELS[name]
    torch.manual_seed(0)
    whole: Any = AUTO[kind].from_config(configuration(), attn_implementation="sdpa")
    with quietly():
        whole.save_pretrained(folder)
    del whole
    cost = model_cost(folder, kind, length=length)
    devices = {}
    for role in ("client", "server"):
        measured = measure_model(cost, role=cast(Any, role), examples=examples, rank=rank, repeats=repeats)
        device = Profile.from_class("laptop", role=cast(Any, role))
        devices[role] = device.model_copy(update={"measured": [measured], "flops": flops_per_second(measured)})
    labels = None if kind == "causal-lm" else ["a", "b"]
    source = load_stage(folder, cast(ModelKind, kind), labels=labels, pad_token_id=0)
    rows = []
    for cut in cuts_of(cost.blocks):
        choice = Choice(cut, examples, checkpointing=checkpointing, rank=rank)
        predicted = predict(cost, devices["client"], choice, devices["server"])
        tuning = "full" if rank is None else "lora"
        config = ModelConfig.model_validate(
            {"id": folder, "tuning": tuning, "lora": {"rank": rank or 8}, "gradient_checkpointing": checkpointing}
        )
        probe = Probe(
            model=folder, kind=kind, cut=cut, examples=examples, length=length, labels=labels,
            model_config=config.model_dump(mode="json"), optimizer=OptimizerConfig().model_dump(mode="json"),
        )  # fmt: skip
        alone, together = _steps(source, probe, config, repeats)
        row = {
            "model": name,
            "blocks": cost.blocks,
            "cut": list(cut),
            "memory_bytes": [predicted.memory_bytes, measure(probe).peak],
            "client_seconds": [predicted.client_seconds, alone],
            "seconds": [predicted.client_seconds + predicted.server_seconds, together],
        }
        rows.append(row)
        if say is not None:
            say(f"{name} {cut}: " + ", ".join(f"{key} {error(row[key]):+.1%}" for key in list(row)[3:]))  # type: ignore[arg-type]
    return rows


def _steps(source: Stage, probe: Probe, config: ModelConfig, repeats: int) -> tuple[float, float]:
    """Seconds of a client's step with an echo for a server, and of one with a server in this process: in turn."""
    assert probe.cut is not None
    stage = carve(source, Part.client(probe.cut, source.anatomy.blocks))
    tune(stage, config)
    model = client_model(probe, stage).train()
    updater = Updater(stage.trainable(), OptimizerConfig())
    batch = random_batch(probe, stage.model.config)

    def alone() -> None:
        model(**batch).loss.backward()
        updater.step()

    together = split_step(
        source, probe.kind, probe.cut, config.tuning, OptimizerConfig(), batch, lambda server: server.connect("bench"),
        lora=config.lora, gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    now = clock()
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 2):
        for step, seconds in zip((alone, together), found, strict=True):
            began = now()
            step()
            if number >= 2:
                seconds.append(now() - began)
    return min(found[0]), min(found[1])
