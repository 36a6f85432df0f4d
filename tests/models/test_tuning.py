"""What is trained: by name, equal for every party, and the only thing that a party has a copy of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexp.config import LoraConfig, ModelConfig
from flexp.errors import ModelError
from flexp.models.anatomy import Part
from flexp.models.architectures import ARCHITECTURES
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_model
from tests.models.tools import SPLIT, whole_of


def tuned(whole: Stage, part: Part, tuning: Any, *, seed: int = 0, **settings: Any) -> dict[str, torch.nn.Parameter]:
    stage = carve(whole, part)
    tune(stage, ModelConfig(id="any", **settings), tuning, seed=seed)
    return stage.trainable()


@pytest.mark.parametrize("name", SPLIT)
def test_lora_gives_every_party_the_same_adapters(name: str) -> None:
    """Also where a mixture of experts mixes linear layers and fused experts, so that parties see different ones."""
    whole = whole_of(name)
    blocks = whole.anatomy.blocks
    everything = tuned(whole, Part.whole(blocks), "lora", seed=4)
    for part in (Part.client((1, 3), blocks), Part.server(1, 3), Part.server(1, 2), Part.client((0, 1), blocks)):
        mine = tuned(whole, part, "lora", seed=4)
        wanted = {
            key for key in everything if (block := whole.block_of(key)) in part.blocks or (block is None and part.ends)
        }
        assert mine.keys() == wanted
        assert all(torch.equal(value, everything[key]) for key, value in mine.items())
    adapters = {key: value for key, value in everything.items() if "lora_" in key}
    assert {whole.block_of(key) for key in adapters} == set(range(blocks))
    assert all(bool(value.any()) == ("lora_A" in key) for key, value in adapters.items())
    heads = set(everything) - set(adapters)
    assert bool(heads) == ARCHITECTURES[name].task.endswith("classification")
    assert all(key.startswith(("classifier", "pre_classifier", "head", "score")) for key in heads)
    other = tuned(whole, Part.whole(blocks), "lora", seed=5)
    assert not any(torch.equal(value, other[key]) for key, value in adapters.items() if "lora_A" in key)


def test_lora_targets() -> None:
    whole = whole_of("llama")
    names = tuned(whole, Part.server(1, 3), "lora", lora=LoraConfig(rank=3, targets=["q_proj", "v_proj"]))
    assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in names} == {"q_proj", "v_proj"}
    assert {min(value.shape) for value in names.values()} == {3}
    with pytest.raises(ModelError, match=r"'query': no linear layer of that name.*down_proj, gate_proj, k_proj"):
        tuned(whole, Part.server(1, 3), "lora", lora=LoraConfig(targets="query"))


def test_a_party_without_blocks_needs_no_adapters() -> None:
    assert tuned(whole_of("llama"), Part.client((0, 4), 4), "lora") == {}
    assert tuned(whole_of("bert"), Part.client((0, 4), 4), "lora").keys() == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", SPLIT)
def test_full_tuning_trains_the_own_part(name: str) -> None:
    whole = whole_of(name)
    blocks = whole.anatomy.blocks
    parameters = dict(whole.model.named_parameters())
    own = {key for key in parameters if whole.block_of(key) in (0, 3)}
    ends = {key for key in parameters if whole.block_of(key) is None}
    client = tuned(whole, Part.client((1, 3), blocks), "full").keys() - {
        key for key in parameters if whole.block_of(key) == 4
    }
    assert own <= client < own | ends
    assert tuned(whole, Part.client((1, 3), blocks), "full", train_embeddings=True).keys() >= own | ends
    server = tuned(whole, Part.server(1, 3), "full")
    assert server.keys() == {key for key in parameters if whole.block_of(key) in (1, 2)}
    assert not tuned(whole, Part.client((1, 3), blocks), "frozen")


@pytest.mark.parametrize(
    ("name", "task", "frozen", "trained"),
    [
        ("llama", None, "model.embed_tokens.weight", "lm_head.weight"),
        ("llama-tied", None, "model.embed_tokens.weight", "model.norm.weight"),  # the head is the embedding
        ("gpt2", "sequence-classification", "transformer.wpe.weight", "score.weight"),
        ("bert", None, "bert.embeddings.LayerNorm.bias", "bert.pooler.dense.weight"),
        ("vit", None, "vit.embeddings.cls_token", "classifier.bias"),
        ("bloom", None, "transformer.word_embeddings_layernorm.weight", "transformer.ln_f.bias"),
    ],
)
def test_embeddings_are_frozen_unless_asked_for(name: str, task: Any, frozen: str, trained: str) -> None:
    names = tuned(whole_of(name, task), Part.client((1, 3), 4), "full")
    assert frozen not in names
    assert "lm_head.weight" not in names or name == "llama"
    assert trained in names


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_only_what_is_trained_is_copied(tuning: str) -> None:
    """Clients in one process share what is frozen; training one leaves the source and the others alone."""
    whole = whole_of("gpt2")
    before = {key: value.clone() for key, value in whole.model.named_parameters()}
    stages = [carve(whole, Part.client((1, 3), 4)) for _ in range(2)]
    for stage in stages:
        tune(stage, ModelConfig.of("any", tuning=tuning))  # type: ignore[arg-type]
        for key, value in stage.model.named_parameters():
            source = before.get(key.replace(".base_layer", ""))
            shared = source is not None and value is whole.model.get_parameter(key.replace(".base_layer", ""))
            assert shared != value.requires_grad, key
    with torch.no_grad():
        for value in stages[0].trainable().values():
            value.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in whole.model.named_parameters())
    ones, twos = stages[0].trainable(), stages[1].trainable()
    assert all(torch.equal(ones[key], twos[key] + 1.0) for key in ones)


def test_a_model_without_checkpointing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage.whole(tiny_model("llama"))
    monkeypatch.setattr(type(stage.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="LlamaForCausalLM knows no gradient checkpointing; switch it off"):
        tune(stage, ModelConfig(id="any", gradient_checkpointing=True))
