"""Train → export → plain transformers or peft: the same logits as inside FlexP. Nothing of FlexP loads the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from flexp.errors import ModelError
from flexp.export.folder import export
from flexp.export.saved import RunModel, open_run

from .tools import answer, batch_of, train

AUTO: dict[str, Any] = {
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
}
FULL = [
    ("bert", {}),
    ("bert", {"embeddings": "file"}),
    ("vit", {}),
    ("gpt2", {}),  # tied
    ("gpt2", {"train_embeddings": True}),
    ("gpt2-untied", {"train_embeddings": True}),
    ("llama-tied", {}),
    ("qwen3_moe", {}),
    ("llama", {"dtype": "bfloat16"}),
]
ATTENTION = {"rank": 4, "alpha": 12.0, "targets": ["q_proj", "v_proj"]}
LORA = [
    ("bert", {}),
    ("vit", {}),
    ("gpt2", {}),
    ("llama-tied", {}),
    ("qwen3_moe", {"lora": ATTENTION}),
    ("llama", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("arch", "model"), FULL)
def test_full(tmp_path: Path, arch: str, model: dict[str, Any]) -> None:
    run = open_run(train(tmp_path, arch, model={"id": str(tmp_path / "model"), **model}))
    for number, data in enumerate(run.world.federation.clients):
        export(RunModel(run, data.name), tmp_path / f"out{number}")
        batch = batch_of(run, data.name)
        loaded = AUTO.get(arch, AutoModelForCausalLM).from_pretrained(tmp_path / f"out{number}")
        assert str(loaded.dtype) == f"torch.{model.get('dtype', 'float32')}"
        expected = answer(run.method.personal(data.name), batch)
        assert torch.equal(answer(loaded, batch), expected)
        assert not torch.allclose(answer(run.world.source.model, batch), expected, atol=1e-3)
        if run.world.federation.task.label_names is not None:
            assert list(loaded.config.id2label.values()) == run.world.federation.task.label_names


@pytest.mark.parametrize(("arch", "model"), LORA)
def test_lora(tmp_path: Path, arch: str, model: dict[str, Any]) -> None:
    settings = {"tuning": "lora", "lora": {"rank": 4, "alpha": 12.0}, **model}
    run = open_run(train(tmp_path, arch, model={"id": str(tmp_path / "model"), **settings}))
    auto, client = AUTO.get(arch, AutoModelForCausalLM), run.world.federation.clients[1].name
    batch = batch_of(run, client)
    expected = answer(run.method.personal(client), batch)
    assert not torch.allclose(answer(run.world.source.model, batch), expected, atol=1e-3)

    export(RunModel(run, client), tmp_path / "whole")
    merged = answer(auto.from_pretrained(tmp_path / "whole"), batch)
    rounding = 0.05 if "dtype" in model else 2e-5  # of bfloat16 weights, of float32 products
    assert float((merged - expected).abs().max()) <= rounding * max(1.0, float(expected.abs().max()))

    export(RunModel(run, client), tmp_path / "adapter", form="adapter")
    settings = AutoConfig.from_pretrained(tmp_path / "adapter")
    base = auto.from_pretrained(tmp_path / "model", config=settings, dtype=settings.dtype, ignore_mismatched_sizes=True)
    assert torch.equal(answer(PeftModel.from_pretrained(base, tmp_path / "adapter"), batch), expected)


def test_what_peft_would_rewrite_is_refused(tmp_path: Path) -> None:
    """peft takes the layers of a dense block for fused experts, and would load an adapter of those."""
    model = {"id": str(tmp_path / "model"), "tuning": "lora"}
    run = open_run(train(tmp_path, "qwen3_moe", model=model))
    with pytest.raises(ModelError, match=r"peft does not load this adapter of a qwen3_moe model.*use --merge"):
        export(RunModel(run, "north"), tmp_path / "adapter", form="adapter")
    assert not (tmp_path / "adapter").exists()
    export(RunModel(run, "north"), tmp_path / "whole")
    batch = batch_of(run, "north")
    found = answer(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), batch)
    assert torch.allclose(found, answer(run.method.personal("north"), batch), atol=2e-5)


def test_another_dtype_is_the_rounded_model(tmp_path: Path) -> None:
    run = open_run(train(tmp_path, "gpt2"))
    export(RunModel(run, "north"), tmp_path / "full")
    export(RunModel(run, "north"), tmp_path / "half", dtype="bfloat16")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    assert full.keys() == half.keys()
    for name, value in half.items():
        assert torch.equal(value, full[name].to(torch.bfloat16))
    for name, value in run.world.source.model.named_parameters():
        assert value.dtype == torch.float32, name  # the run's own model is as it was
