"""Caches of parts of a model: what is elsewhere is counted, what is here is kept, and odd models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from flexp.errors import ModelError
from flexp.models.anatomy import Part
from flexp.models.caching import PartCache, cached_plan, check_cached
from flexp.models.stage import Stage, carve
from flexp.models.zoo import tiny_model

WINDOWED = ("gemma3", "mistral", "qwen2")


@pytest.mark.parametrize("name", ["llama", "bloom", *WINDOWED])
def test_a_cache_of_no_blocks_says_of_its_length_what_a_whole_one_does(name: str) -> None:
    """Masks are made of nothing else."""
    model: Any = tiny_model(name, task="causal-lm")
    whole, none = DynamicCache(config=model.config), PartCache(model, frozenset())
    for new in (3, 1, 1, 4, 1):
        ids = torch.randint(5, 97, (2, new), generator=torch.Generator().manual_seed(new))
        for index in range(4):
            for following in (1, 5):
                assert none.get_mask_sizes(following, index) == whole.get_mask_sizes(following, index)
            assert none.get_seq_length(index) == whole.get_seq_length(index)
        assert none.is_sliding == whole.is_sliding
        with torch.no_grad():
            model(input_ids=ids, past_key_values=whole, use_cache=True)
        none.advance(new)
    assert (none.length, none.bytes) == (10, 0)
    assert none.is_sliding.count(True) == {"gemma3": 2, "mistral": 4, "qwen2": 2}.get(name, 0)


def test_own_blocks_are_kept_and_others_may_not_be_written() -> None:
    model: Any = tiny_model("llama", task="causal-lm")
    stage = carve(Stage.whole(model), Part.server(1, 3))
    cache = PartCache(stage.model, frozenset({1, 2}))
    z_BTH, positions = torch.randn(2, 3, 32), torch.arange(3)[None]
    plan = cached_plan(stage, z_BTH, None, positions, cache)
    with torch.no_grad():
        stage.run(z_BTH, plan, 1, 3)
    cache.advance(3)
    assert [layer.get_seq_length() for layer in cache.layers] == [3] * 4
    assert cache.bytes == 2 * 2 * 2 * 3 * (2 * 8) * 4  # blocks, keys and values, rows, tokens, heads × width, float32
    with pytest.raises(ModelError, match="a party that does not own it"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ModelError, match="cannot take tokens back"):
        cache.crop(-1)


def test_rows_of_what_is_elsewhere_need_no_order() -> None:
    cache = PartCache(tiny_model("gemma3", task="causal-lm"), frozenset())
    cache.advance(5)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert cache.length == 5


def test_a_model_that_hides_its_cache_from_its_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage.whole(tiny_model("llama", task="causal-lm"))
    check_cached(stage)
    for block in stage.blocks:
        block.register_forward_pre_hook(_without_cache, with_kwargs=True)
    with pytest.raises(ModelError, match="they are not given the cache"):
        check_cached(stage)


def test_a_model_whose_blocks_see_the_tokens_between_two_of_them_is_refused() -> None:
    stage = Stage.whole(tiny_model("llama", task="causal-lm"))
    model = stage.model
    forward = type(model.model).forward

    def peeking(self: Any, input_ids: torch.Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():  # harmless until the second token
            inputs["position_ids"] = inputs["position_ids"] + input_ids
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, **inputs)

    model.model.__class__ = type("Peeking", (type(model.model),), {"forward": peeking})
    with pytest.raises(ModelError, match="they would get other arguments on a server"):
        check_cached(stage)


def _without_cache(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "past_key_values": None}
