"""Small models on disk, and profiles and costs to predict with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest

from flexp.config import ModelConfig
from flexp.cost.model_cost import ModelCost, model_cost
from flexp.cost.profile import ModelSeconds, PieceSeconds, Profile, ShapeSeconds
from flexp.models.architectures import ARCHITECTURES


@lru_cache
def cost_of(name: str, *, without_content: bool = False, **settings: Any) -> ModelCost:
    """Of a tiny model, at 10 tokens; ``settings`` are keys of ``[model]``.

    Counted on real tensors, which is faster for models this small; tests/cost/test_model_cost.py holds it to the same
    figures without them.
    """
    cost = model_cost(ModelConfig.of(f"arch:{name}", **settings), ARCHITECTURES[name].task, length=10, labels=3)
    cost._real = not without_content
    return cost


@contextmanager
def counted_on_tensors() -> Iterator[None]:
    """Counts of tiny models on real tensors for as long, in a sixth of the time."""
    make = ModelCost.__init__

    def made(self: ModelCost, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        self._real = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelCost, "__init__", made)
        yield


def plain_profile(**changes: Any) -> Profile:
    """A device with round figures that was not measured."""
    figures: dict[str, Any] = {
        "name": "d", "memory_bytes": 10**9, "flops": 1e9, "uplink_bps": 1e6, "downlink_bps": 4e6, "latency_s": 0.01,
    }  # fmt: skip
    return Profile(**{**figures, **changes})


def seconds(forward: float, backward: float, flops: tuple[float, float] = (0.0, 0.0)) -> PieceSeconds:
    return PieceSeconds(forward=forward, backward=backward, forward_flops=flops[0], backward_flops=flops[1])


def measured(cost: ModelCost, **changes: Any) -> ModelSeconds:
    """A block takes 1 + 2 s for each example (its operations as counted), the ends nothing."""

    def shape(examples: int) -> ShapeSeconds:
        blocks = [
            seconds(1.0 * examples, 2.0 * examples, (piece.forward_flops, piece.backward_flops))
            for piece in cost.at(examples).blocks
        ]
        return ShapeSeconds(examples=examples, embed=seconds(0, 0), blocks=blocks, head=seconds(0, 0))

    figures: dict[str, Any] = {
        "model": cost.fingerprint, "kind": cost.kind, "dtype": cost.config.dtype, "length": cost.length,
        "shapes": [shape(2), shape(4)],
    }  # fmt: skip
    return ModelSeconds(**{**figures, **changes})
