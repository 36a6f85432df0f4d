"""Parties made of one tiny model, and what the tests of the models' room look at."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from flexp.client.model import SplitModel
from flexp.client.pretrained import SPLIT_MODELS
from flexp.config import ModelConfig, OptimizerConfig, ServerConfig
from flexp.models.anatomy import Part
from flexp.models.architectures import ARCHITECTURES
from flexp.models.loading import DTYPES
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_model
from flexp.run.verify import Outcome, Setup, compare
from flexp.server import Server

SPLIT = [name for name, spec in ARCHITECTURES.items() if not spec.refused]
TEXT = [name for name in SPLIT if name != "vit"]
PLAIN = OptimizerConfig(name="sgd", lr=1e-2, clip=None)


@lru_cache
def model_of(name: str, task: str | None, attention: str, dtype: str) -> Any:
    """A tiny model to make stages of; it is never trained itself."""
    return tiny_model(name, task=task, attention=attention, dtype=DTYPES[dtype])  # type: ignore[arg-type]


def whole_of(name: str, task: str | None = None, attention: str = "sdpa", dtype: str = "float32") -> Stage:
    """A whole tiny model with tensors of its own."""
    return Stage.whole(copy.deepcopy(model_of(name, task, attention, dtype)))


def both(name: str, **settings: Any) -> Outcome:
    """Whole and split training side by side, of stages carved out of one model in memory."""
    task = settings.get("task") or ARCHITECTURES[name].task
    setup = Setup.of(f"arch:{name}", **{"steps": 2, **settings, "task": task})
    whole = whole_of(name, task, setup.model.attention, setup.model.dtype)
    blocks = whole.anatomy.blocks
    start, stop = setup.cut or (1, blocks - 1)
    source = whole_of(name, task, setup.model.attention, setup.model.dtype)
    base = start if setup.model.base_depth is None else setup.model.base_depth
    client = carve(source, Part.client((start, stop or blocks), blocks))
    return compare(setup, whole, client, carve(source, Part.server(base, stop or blocks)))


def parties(
    name: str, cut: tuple[int, int] = (1, 3), *, seed: int = 0, memory: str = "keep", dropout: float = 0.0, **more: Any
) -> tuple[Server, SplitModel]:
    """A server and its only client, in full tuning with embeddings."""
    source = Stage.whole(tiny_model(name, dropout=dropout, **more))
    stage = carve(source, Part.server(*cut))
    tune(stage, ModelConfig(id="any"))
    server = Server(stage, optimizer=PLAIN, config=ServerConfig(memory=memory), seed=seed)  # type: ignore[arg-type]
    return server, client_of(server, source, cut, "a")


def client_of(server: Server, source: Stage, cut: tuple[int, int], name: str) -> SplitModel:
    stage = carve(source, Part.client(cut, source.anatomy.blocks))
    tune(stage, ModelConfig(id="any", train_embeddings=True))
    called = type(stage.model).__name__
    kind = next((kind for kind in ("sequence", "image") if kind in called.lower()), None)
    cls = SPLIT_MODELS["causal-lm" if kind is None else f"{kind}-classification"]
    return cls(stage, cut, server.connect(name), expose_embeddings=True).train()


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Every parameter and buffer by every name that it has."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: value for name, value in named if value.numel()}


def save(name: str, folder: Path, **settings: Any) -> Path:
    """A checkpoint as one finds them: with a cache switched on."""
    model: Any = tiny_model(name, **settings)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True
    model.save_pretrained(folder)
    return folder


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def small(model_type: str, **options: Any) -> Any:
    """A tiny text classifier or language model of an architecture that the zoo does not hold."""
    sizes = {
        "hidden_size": 32,
        "embedding_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, **sizes, **options)
    config.num_labels = 3
    auto: Any = AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        auto = AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).eval()
