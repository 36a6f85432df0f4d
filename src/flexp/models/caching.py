"""Keys and values of an answer, where each party keeps those of its own blocks.

transformers' models make masks and positions from what their cache says of its length. A party's cache holds keys and
values for its own blocks; for all others it only counts, so that every party makes the masks of the whole model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from flexp.errors import ModelError
from flexp.models import execution
from flexp.models.anatomy import Part
from flexp.models.batches import check_length
from flexp.models.execution import BlockCall, ExecutionPlan
from flexp.models.stage import Stage, carve
from flexp.rng import undisturbed


class _Elsewhere:
    """What a layer does whose keys and values another party keeps: it counts, and nothing else."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass

    def update(self, *_: Any, **__: Any) -> Any:
        raise ModelError("a block wrote into the cache of a party that does not own it")


class _Counted(_Elsewhere, DynamicLayer):  # type: ignore[misc]
    length = 0

    def get_seq_length(self) -> int:
        return self.length

    def advance(self, tokens: int) -> None:
        self.length += tokens


class _CountedSliding(_Elsewhere, DynamicSlidingWindowLayer):  # type: ignore[misc]
    def advance(self, tokens: int) -> None:
        self.cumulative_length += tokens


class PartCache(DynamicCache):  # type: ignore[misc]
    """The cache of a model of which a party runs only ``blocks``.

    Raises:
        ModelError: the architecture keeps something else than keys and values.
    """

    layers: list[Any]
    is_croppable = False  # blocks elsewhere would have to forget as well

    def __init__(self, model: Any, blocks: frozenset[int]) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        kinds = {type(layer) for layer in self.layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer} or not model._supports_default_dynamic_cache():
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ModelError(
                f"{type(model).__name__} cannot write answers while it is split: between two tokens it keeps {names}, "
                "expected keys and values; export the model and use it whole"
            )
        self.layers = [layer if index in blocks else _elsewhere(layer) for index, layer in enumerate(self.layers)]

    @property
    def length(self) -> int:
        """Tokens so far."""
        return int(self.get_seq_length())

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        kept = [value for layer in self.layers for value in (layer.keys, layer.values) if value is not None]
        return sum(value.numel() * value.element_size() for value in kept)

    def advance(self, tokens: int) -> None:
        """Count new tokens in the blocks that other parties run; the party's own count by themselves."""
        for layer in self.layers:
            if isinstance(layer, _Elsewhere):
                layer.advance(tokens)  # type: ignore[attr-defined]

    def crop(self, *_: Any) -> None:
        raise ModelError("a split model cannot take tokens back, as assisted generation does; generate without")


def cached_plan(
    stage: Stage, hidden_BTH: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None, cache: PartCache
) -> ExecutionPlan:
    """How a party without inputs calls its blocks for new tokens (B, T, H); ``mask_BT`` is over all tokens so far."""
    ids = torch.zeros(hidden_BTH.shape[:2], dtype=torch.long, device=hidden_BTH.device)
    with undisturbed(hidden_BTH.device):
        return _record(stage, ids, mask_BT, positions_BT, cache)


def check_cached(stage: Stage) -> None:
    """Refuse a model whose blocks would get other arguments on a server, between two tokens or at the beginning.

    Raises:
        ModelError: see above. ``stage`` must have the ends.
    """
    stage.plan({"input_ids": torch.ones(1, 2, dtype=torch.long, device=stage.model.device)})  # what all splitting needs
    name = type(stage.model).__name__
    none: frozenset[int] = frozenset()
    for past, new in ((0, 4), (5, 1)):
        ids = torch.arange(1, 2 * new + 1, device=stage.model.device).view(2, new)
        mask = torch.ones(2, past + new, dtype=torch.long, device=ids.device)
        mask[0, 0] = 0
        accepts = "position_ids" in inspect.signature(type(stage.model).forward).parameters
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:] if accepts else None
        plans: list[ExecutionPlan] = []
        stub = carve(stage, Part(none, ends=False))
        stub.blocks[0].register_parameter("any", nn.Parameter(torch.zeros(0, dtype=stage.model.dtype)))
        for party, tokens in ((stage, ids), (stub, torch.zeros_like(ids))):
            cache = PartCache(stage.model, none)
            cache.advance(past)
            with undisturbed(ids.device):
                plans.append(_record(party, tokens, mask, positions, cache))
        given = [ExecutionPlan(tuple(_without_caches(call) for call in plan.calls), plan.tuples) for plan in plans]
        cached = all(_has_cache(call) for call in plans[0].calls)
        if not cached or given[0].difference(given[1]):
            why = "they would get other arguments on a server" if cached else "they are not given the cache"
            raise ModelError(
                f"{name} cannot write answers while it is split: its blocks keep more than keys and values between two "
                f"tokens ({why}); export the model and use it whole"
            )


def _record(
    stage: Stage, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: PartCache
) -> ExecutionPlan:
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if mask is not None:
        inputs["attention_mask"] = mask
    if positions is not None:
        inputs["position_ids"] = positions
    check_length(stage.model, cache.length + ids.shape[1], positions, stage.longest)
    with torch.no_grad(), stage.computing():
        _, plan = execution.record(stage.model, stage.blocks, inputs, stage._tuples)
    stage._tuples = plan.tuples
    return plan


def _elsewhere(layer: Any) -> Any:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return _CountedSliding(sliding_window=layer.sliding_window)
    return _Counted()


def _without_caches(call: BlockCall) -> BlockCall:
    args = tuple("cache" if isinstance(value, Cache) else value for value in call.args)
    kwargs = {key: "cache" if isinstance(value, Cache) else value for key, value in call.kwargs.items()}
    return BlockCall(args, kwargs, call.keyword)


def _has_cache(call: BlockCall) -> bool:
    return any(isinstance(value, Cache) for value in (*call.args, *call.kwargs.values()))
