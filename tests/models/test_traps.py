"""What goes wrong silently when a model is split carelessly: each trap is avoided here, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexp.errors import ConfigError, ModelError
from flexp.models.anatomy import Part, check_cut
from flexp.models.architectures import ARCHITECTURES
from flexp.models.execution import Absent, same
from flexp.models.stage import Stage, carve
from flexp.models.zoo import tiny_batch, tiny_model
from tests.models.tools import SPLIT, parties, small, whole_of


@pytest.mark.parametrize("name", SPLIT)
def test_the_server_holds_blocks_and_nothing_else(name: str) -> None:
    """No parameter outside of its blocks, hence nothing that embeds a token or names a class."""
    whole = whole_of(name)
    server = carve(whole, Part.server(1, 3))
    for key, value in server.model.named_parameters(remove_duplicate=False):
        assert server.block_of(key) in (1, 2), key
        assert value is whole.model.get_parameter(key)  # carving copies nothing
    blocks = [value for key, value in whole.model.named_parameters() if whole.block_of(key) in (1, 2)]
    assert sum(v.numel() for v in server.model.parameters()) == sum(v.numel() for v in blocks)
    hidden = torch.zeros(1, 10, 32)
    plan = server.plan_without_inputs(hidden, None)
    with pytest.raises(ModelError, match="without the ends"):
        server.finish(hidden, {}, plan)


@pytest.mark.parametrize("name", SPLIT)
def test_the_servers_plan_needs_shape_and_mask_only(name: str) -> None:
    whole, other = whole_of(name), Stage.whole(tiny_model(name, seed=5))
    server = carve(other, Part.server(1, 3))
    for padding in ("none",) if name == "vit" else ("none", "left", "right"):
        batch = tiny_batch(whole.model, padding=padding)  # type: ignore[arg-type]
        hidden, plan = whole.plan(batch)
        assert not plan.difference(server.plan_without_inputs(torch.randn_like(hidden), batch.get("attention_mask")))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe", "modernbert"])
def test_blocks_keep_their_indices(name: str) -> None:
    """Block 2 under index 0 would be another block: a sliding window for a full one, experts for a dense layer."""
    whole = whole_of(name)
    server = carve(whole, Part.server(2, 3))
    assert isinstance(server.blocks[0], Absent)
    assert type(server.blocks[2]) is type(whole.blocks[2])
    batch = tiny_batch(whole.model, padding="left")
    with torch.no_grad():
        hidden, plan = whole.plan(batch)
        right = whole.run(hidden, plan, 2, 3)
        assert torch.equal(server.run(hidden, plan, 2, 3), right)
        if name != "qwen3_moe":
            shifted = copy.copy(plan)
            object.__setattr__(shifted, "calls", (plan.calls[3],) * len(plan.calls))
            assert not torch.allclose(server.run(hidden, shifted, 2, 3), right, atol=1e-3)
    with pytest.raises(ModelError, match="block 0 was asked to run on a party that does not own it"):
        server.run(hidden, plan, 0, 1)


@pytest.mark.parametrize(("name", "padding"), [("llama", "left"), ("gpt2", "left"), ("bert", "right"), ("opt", "left")])
def test_the_mask_matters(name: str, padding: Any) -> None:
    """A server that is not sent the mask attends to padding: the trap that makes the mask part of the protocol."""
    whole = whole_of(name)
    server = carve(whole, Part.server(1, 3))
    batch = tiny_batch(whole.model, padding=padding)
    with torch.no_grad():
        hidden, plan = whole.plan(batch)
        real = batch["attention_mask"].bool()
        right = whole.run(hidden, plan, 1, 3)
        assert torch.equal(server.run(hidden, server.plan_without_inputs(hidden, batch["attention_mask"]), 1, 3), right)
        without = server.run(hidden, server.plan_without_inputs(hidden, None), 1, 3)
        assert (without - right)[real].abs().max() > 0.01
    with pytest.raises(ModelError, match=r"the attention mask has shape \(3, 7\), expected \(3, 10\)"):
        server.plan_without_inputs(hidden, batch["attention_mask"][:, :7])


def test_a_mask_of_ones_is_no_mask() -> None:
    whole = whole_of("gemma3")
    batch = tiny_batch(whole.model)
    ones = torch.ones_like(batch["input_ids"])
    assert not whole.plan(batch)[1].difference(whole.plan({**batch, "attention_mask": ones})[1])


@pytest.mark.parametrize(("name", "tuples"), [("gptj", True), ("falcon", True), ("bloom", True), ("llama", False)])
def test_blocks_may_give_back_tuples(name: str, tuples: bool) -> None:
    assert whole_of(name).plan(tiny_batch(whole_of(name).model))[1].tuples == tuples


def test_tied_embeddings_stay_tied_when_both_ends_are_trained() -> None:
    _, split = parties("gpt2")
    model: Any = split.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in split.stage.trainable()
    assert "transformer.wte.weight" in split.stage.trainable()


@pytest.mark.parametrize("name", ["gptj", "granitemoe", "bert"])
def test_no_cache_ever_reaches_a_block(name: str) -> None:
    """A configuration with a cache, as checkpoints have it, would make each replay append to it."""
    model = tiny_model(name) if name in ARCHITECTURES else small(name)
    model.config.use_cache = True
    stage = Stage.whole(model)
    batch = tiny_batch(model)
    hidden, plan = stage.plan(batch)
    assert all("Cache" not in type(value).__name__ for call in plan.calls for value in call.kwargs.values())
    assert torch.equal(stage.run(hidden, plan, 0, 4), stage.run(hidden, plan, 0, 4))


@given(blocks=st.integers(1, 64), start=st.integers(-2, 66), stop=st.none() | st.integers(-2, 66))
def test_every_cut_is_complete_or_refused(blocks: int, start: int, stop: int | None) -> None:
    end = blocks if stop is None else stop
    if 0 <= start < end <= blocks:
        cut = check_cut((start, stop), blocks)
        client, server = Part.client(cut, blocks), Part.server(*cut)
        assert cut == (start, end)
        assert client.blocks | server.blocks == Part.whole(blocks).blocks
        assert not client.blocks & server.blocks
        assert (client.ends, server.ends) == (True, False)
    else:
        with pytest.raises(ConfigError, match=rf"cut = \({start}, {end}\) does not fit a model of {blocks} blocks"):
            check_cut((start, stop), blocks)


def test_arguments_are_compared_bit_for_bit() -> None:
    one = torch.tensor([1.0, 2.0])
    assert same((one, None, {"a": [one, 1]}), (one.clone(), None, {"a": [one.clone(), 1]}))
    for other in (one + 1e-7, one.double(), one[:1], None, 1.0, torch.tensor([1.0, float("nan")])):
        assert not same((one,), (other,))
    assert not same(1, True)
    assert not same({}, {})  # might be a cache that blocks fill
    assert not same([], [])
    assert not same(object(), object())
