"""The zoo's models must be what the other tests take them for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from flexp.errors import ModelError
from flexp.models.architectures import PAD, POSITIONS, WINDOW
from flexp.models.zoo import ARCHITECTURES, save_tiny, tiny_batch, tiny_model

SPLIT = [name for name, spec in ARCHITECTURES.items() if not spec.refused]
TEXT = [name for name in SPLIT if name != "vit"]
TASKS = [(name, task) for name, spec in ARCHITECTURES.items() if not spec.refused for task in spec.tasks]
TIED = {"gpt2", "llama-tied", "gemma", "gemma2", "gemma3", "opt", "opt-projected", "gpt_neo", "bloom"}
TIED |= {"falcon", "falcon-new", "falcon-alibi"}


@pytest.fixture(autouse=True)
def _without_progress_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def blocks_of(model: Any) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return next(m for m in lists if len(m) == model.config.num_hidden_layers)


def calls_of(model: Any, batch: dict[str, torch.Tensor]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block is called with."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return calls


EAGER = [(name, ARCHITECTURES[name].task, "eager") for name in SPLIT]  # the head does not look at the attention


@pytest.mark.parametrize(("name", "task", "attention"), [*((*pair, "sdpa") for pair in TASKS), *EAGER])
def test_every_model_computes_a_loss_and_gradients(name: str, task: Any, attention: Any) -> None:
    spec = ARCHITECTURES[name]
    model: Any = tiny_model(name, task=task, attention=attention)
    assert model.config._attn_implementation == (attention if attention in spec.attentions else "eager")
    assert model.config.num_hidden_layers in (4, 5)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    for padding in ("none",) if name == "vit" else ("none", "left", "right"):
        out = model(**tiny_batch(model, padding=padding))
        assert torch.isfinite(out.loss)
        assert out.logits.std() > 0.05  # signals large enough for mistakes to show
    out.loss.backward()
    for index, block in enumerate(blocks_of(model)):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters()), index


@pytest.mark.parametrize("name", SPLIT)
def test_equal_arguments_give_equal_models(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", SPLIT)
def test_no_bias_and_no_norm_weight_is_left_at_its_initial_value(name: str) -> None:
    for key, value in tiny_model(name).named_parameters():
        assert value.std() > 0.01, key


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe", "vit"])
def test_other_types_round_the_weights_and_nothing_else(name: str) -> None:
    full: Any = tiny_model(name)
    half: Any = tiny_model(name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for key, value in full.named_parameters():
        assert torch.equal(half.get_parameter(key), value.bfloat16()), key
    for key, value in full.named_buffers():
        if "inv_freq" in key:
            assert torch.equal(half.get_buffer(key), value), key
    assert torch.isfinite(half(**tiny_batch(half)).loss)


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_dropout_is_off_unless_asked_for(name: str, task: Any) -> None:
    for dropout in (0.0, 0.5):
        model: Any = tiny_model(name, task=task, dropout=dropout)
        batch = tiny_batch(model)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            calm = model(**batch).logits
            assert torch.equal(model.train()(**batch).logits, calm) == (dropout == 0.0)


@pytest.mark.parametrize("name", TEXT)
def test_weights_are_tied_where_the_family_ties_them(name: str) -> None:
    if "causal-lm" not in ARCHITECTURES[name].tasks:
        return
    model: Any = tiny_model(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in TIED)


@pytest.mark.parametrize(
    ("name", "alike", "different"),
    [
        ("llama", (0, 1), None),
        ("qwen2", (0, 1), (0, 2)),
        ("gemma2", (0, 2), (0, 1)),
        ("gemma3", (0, 2), (0, 1)),
        ("gpt_neo", (0, 2), (0, 1)),
        ("modernbert", (1, 2), (1, 3)),
    ],
)
def test_blocks_of_equal_weights_differ_by_their_index(
    name: str, alike: tuple[int, int], different: tuple[int, int] | None
) -> None:
    model: Any = tiny_model(name)
    blocks = blocks_of(model)
    for block in blocks[1:]:
        block.load_state_dict(blocks[1].state_dict(), strict=False)  # ModernBERT's first block has no attention norm
    blocks[0].load_state_dict(blocks[1].state_dict(), strict=False)
    calls = calls_of(model, tiny_batch(model))
    hidden = calls[1][0][0]

    def run(index: int) -> torch.Tensor:
        args, kwargs = calls[index]
        with torch.no_grad():
            out = blocks[index](hidden, *args[1:], **kwargs)
        return out[0] if isinstance(out, tuple) else out

    assert torch.equal(run(alike[0]), run(alike[1]))
    if different is not None:
        assert (run(different[0]) - run(different[1])).abs().max() > 1e-3


def test_mistral_attends_to_a_window_only() -> None:
    model = tiny_model("mistral")
    for _, kwargs in calls_of(model, tiny_batch(model)):
        assert kwargs["attention_mask"][0, 0].sum(-1).tolist() == [min(i + 1, WINDOW) for i in range(10)]


def test_qwen3_moe_mixes_dense_blocks_and_experts() -> None:
    kinds = [type(block.mlp).__name__ for block in blocks_of(tiny_model("qwen3_moe"))]
    assert kinds[0] == kinds[2] == kinds[3] != kinds[1]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["gpt2", "opt", "bert"]),
    padding=st.sampled_from(["none", "left", "right"]),
    batch=st.integers(1, 6),
    length=st.integers(1, POSITIONS),
    seed=st.integers(0, 9),
)
def test_batches_are_padded_on_the_side_asked_for(name: str, padding: Any, batch: int, length: int, seed: int) -> None:
    model: Any = MODELS[name]
    out = tiny_batch(model, padding=padding, batch=batch, length=length, seed=seed)
    again = tiny_batch(model, padding=padding, batch=batch, length=length, seed=seed)
    assert out.keys() == again.keys()
    assert all(torch.equal(out[key], again[key]) for key in out)
    ids = out["input_ids"]
    assert ids.shape == (batch, length)
    assert ("attention_mask" in out) == (padding != "none")
    mask = out.get("attention_mask", torch.ones_like(ids))
    assert torch.equal(ids == model.config.pad_token_id, mask == 0)
    assert mask.sum(-1).min() >= 1
    assert mask[0].all()
    steps = mask.diff(dim=-1)
    assert (steps >= 0).all() if padding == "left" else (steps <= 0).all()
    if padding != "none" and length > batch:
        assert len(set(mask.sum(-1).tolist())) == batch
    if name == "bert":
        assert out["labels"].shape == (batch,)
    else:
        assert torch.equal(out["labels"], ids.where(mask == 1, -100))


MODELS: dict[str, Any] = {name: tiny_model(name) for name in ("gpt2", "opt", "bert")}


@pytest.mark.parametrize(
    ("name", "task", "auto"),
    [
        ("llama-tied", "causal-lm", AutoModelForCausalLM),
        ("qwen3_moe", "causal-lm", AutoModelForCausalLM),
        ("gemma3", "causal-lm", AutoModelForCausalLM),
        ("gpt_neox", "sequence-classification", AutoModelForSequenceClassification),
        ("modernbert", "sequence-classification", AutoModelForSequenceClassification),
    ],
)
def test_saved_models_load_again(tmp_path: Any, name: str, task: Any, auto: Any) -> None:
    folder = save_tiny(name, tmp_path / "new" / "folder", task=task, seed=3)
    model: Any = tiny_model(name, task=task, seed=3)
    loaded = auto.from_pretrained(folder, attn_implementation="sdpa")
    batch = tiny_batch(model, padding="left")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in SPLIT])
def test_refused_architectures_can_be_made_and_say_why(name: str) -> None:
    model: Any = tiny_model(name)
    assert torch.isfinite(model(**tiny_batch(model, padding="right")).loss)
    assert len(ARCHITECTURES[name].reason) > 20


def test_mistakes_are_named() -> None:
    with pytest.raises(ModelError, match=r"no architecture 'gpt5'.*gpt2, "):
        tiny_model("gpt5")
    with pytest.raises(ModelError, match="arch:vit has no task 'causal-lm'; it has: image-classification"):
        tiny_model("vit", task="causal-lm")
    with pytest.raises(ModelError, match="images have no padding"):
        tiny_batch(tiny_model("vit"), padding="left")
    with pytest.raises(ModelError, match="expected one of: none, left, right"):
        tiny_batch(MODELS["gpt2"], padding="both")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"length {POSITIONS + 1} does not fit"):
        tiny_batch(MODELS["gpt2"], length=POSITIONS + 1)
    assert MODELS["gpt2"].config.pad_token_id == PAD
