"""Types of model that were refused, or failed, for the wrong reason: each is exact now, or refused in its own words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import AutoConfig

import flexp
from flexp.config import LoraConfig, ModelConfig
from flexp.errors import FlexpError, ModelError
from flexp.models.batches import max_positions
from flexp.models.fingerprint import weights_fingerprint
from flexp.models.heads import AUTO
from flexp.models.loading import load_stage
from flexp.models.stage import Stage
from flexp.models.tuning import tune
from flexp.models.zoo import save_tiny
from flexp.run.verify import Setup, verify

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {"vocab_size": 97, "max_position_embeddings": 64, "pad_token_id": 0}
GEMMA = {
    "text_config": {
        **SIZES,
        **TEXT,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "vision_config": {**SIZES, "image_size": 8, "patch_size": 4},  # as many blocks as the text has
    "mm_tokens_per_image": 4,
}
MAMBA2 = {
    "num_key_value_heads": 2,
    "attn_layer_indices": [1, 3],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
}
PHI = {
    **SIZES,
    **TEXT,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}


def saved(folder: Path, model_type: str, kind: str, options: dict[str, Any]) -> Path:
    config = AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    AUTO[kind].from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "kind", "options", "length"),
    [
        ("gemma3", "causal-lm", GEMMA, 10),
        ("gemma3", "sequence-classification", {**GEMMA, "num_labels": 3}, 10),
        ("phi3", "causal-lm", PHI, 24),
        ("dinov2", "image-classification", {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}, 10),
        ("mamba", "causal-lm", {**SIZES, **TEXT, "state_size": 4}, 10),
        ("doge", "causal-lm", {**SIZES, **TEXT, "num_key_value_heads": 2}, 10),  # an attention mask that is trained
        ("bamba", "causal-lm", {**SIZES, **TEXT, **MAMBA2}, 10),  # blocks give back two values
        ("deberta", "sequence-classification", {**SIZES, **TEXT, "num_labels": 3}, 10),  # without relative positions
        ("big_bird", "sequence-classification", {**SIZES, **TEXT, "num_labels": 3}, 10),
        ("codegen", "causal-lm", {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "vocab_size": 97}, 10),
    ],
)
def test_it_is_exact(model_type: str, kind: Any, options: dict[str, Any], length: int, tmp_path: Path) -> None:
    folder = saved(tmp_path, model_type, kind, options)
    padding: Any = "none" if kind == "image-classification" else "right"
    outcome = verify(Setup.of(str(folder), task=kind, steps=2, length=length, padding=padding, memory="recompute"))
    assert outcome.exact, outcome


def test_what_plain_transformers_cannot_train_is_said(tmp_path: Path) -> None:
    """An xLSTM in its training mode takes whole chunks only."""
    options = {**SIZES, **TEXT, "num_heads": 4, "chunk_size": 8, "mode": "train", "return_last_states": False}
    folder = saved(tmp_path, "xlstm", "causal-lm", options)
    with pytest.raises(ModelError, match=r"whole model fails on such a batch \(ValueError: Sequence length 10 is not"):
        verify(Setup.of(str(folder), length=10))


@pytest.mark.parametrize("model_type", ["resnet", "mobilenet_v2"])
def test_models_without_blocks_are_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    server = flexp.Server.from_pretrained("arch:vit", "image-classification")
    split = flexp.SplitModelForImageClassification
    for attempt in (
        lambda: flexp.Server.from_pretrained(tmp_path, "image-classification"),
        lambda: split.from_pretrained(tmp_path, cut=(1, 2), link=server.connect("a")),
        lambda: verify(Setup.of(str(tmp_path))),
    ):
        with pytest.raises(ModelError, match=r"names no row of like blocks \(num_hidden_layers\)"):
            attempt()


def test_what_is_not_a_damaged_file_is_not_called_one(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_act = "nonsense"
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"cannot make this BertForSequenceClassification .*nonsense") as caught:
        load_stage(str(folder), "sequence-classification")
    assert "fetch it again" not in str(caught.value)
    save_tiny("bert", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FlexpError, match="fetch it again"):
        load_stage(str(folder), "sequence-classification")


def test_files_that_nobody_loads_make_no_other_model(tmp_path: Path) -> None:
    folder = save_tiny("bert", tmp_path / "a")
    before = weights_fingerprint(folder)
    other = save_tiny("bert", tmp_path / "b", seed=1)
    for name in ("model.fp16.safetensors", "consolidated.safetensors"):
        shutil.copy(other / "model.safetensors", folder / name)
    assert before is not None
    assert weights_fingerprint(folder) == before != weights_fingerprint(other)


@pytest.mark.parametrize(
    "model_type",
    ["roberta", "xlm-roberta-xl", "data2vec-text", "esm", "markuplm", "ibert", "camembert", "xmod", "bert"],
)
def test_the_longest_input_is_what_plain_transformers_takes(model_type: str) -> None:
    options = {**SIZES, **TEXT, "max_position_embeddings": 16, "pad_token_id": 3, "position_embedding_type": "absolute"}
    config = AutoConfig.for_model(model_type, **options)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    if model_type == "xmod":
        model.set_default_language("en_XX")
    longest = max_positions(config)
    assert longest is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))


def test_adapters_of_a_state_space_model_are_those_that_peft_takes(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", **SIZES, **TEXT, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    stage = Stage.whole(model)
    tune(stage, ModelConfig(id="any", tuning="lora"))
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in stage.trainable()}
    assert layers == {"in_proj", "x_proj", "dt_proj"}
    plain = transformers.AutoModelForCausalLM.from_config(config)
    peft.get_peft_model(plain, peft.LoraConfig(target_modules=sorted(layers)))
    with pytest.raises(ModelError, match=r"no linear layer of that name.* expected some of dt_proj, in_proj, x_proj"):
        tune(Stage.whole(transformers.AutoModelForCausalLM.from_config(config)), _lora("out_proj"))


def _lora(*targets: str) -> ModelConfig:
    return ModelConfig(id="any", tuning="lora", lora=LoraConfig(targets=list(targets)))


@pytest.mark.parametrize("named", [True, False])
def test_more_labels_than_tokens(named: bool, tmp_path: Path) -> None:
    """Several labels an example, as plain transformers has them: numbers, one for each class."""
    folder, names = save_tiny("bert", tmp_path), [f"c{number}" for number in range(9)]
    config = AutoConfig.from_pretrained(folder)
    config.num_labels, config.problem_type = 9, None if named else "multi_label_classification"
    plain = AUTO["sequence-classification"].from_config(config)
    plain.save_pretrained(folder)
    server = flexp.Server.from_pretrained(folder, "sequence-classification")
    split = flexp.SplitModelForSequenceClassification.from_pretrained(
        folder, cut=(1, 3), link=server.connect("a"), labels=names if named else None
    )
    whole = AUTO["sequence-classification"].from_pretrained(folder)
    if named:
        whole.classifier.load_state_dict(split.model.classifier.state_dict())
    batch = {"input_ids": torch.tensor([[7, 8, 9]] * 6), "labels": torch.randint(0, 2, (6, 9)).float()}
    expected, given = whole.train()(**batch).loss, split.train()(**batch).loss
    assert torch.equal(expected, given)
    given.backward()
    expected.backward()
    assert torch.equal(whole.classifier.weight.grad, split.model.classifier.weight.grad)
    assert server.shared.version == 1
