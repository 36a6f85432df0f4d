"""Rates of new weights beside those of pretrained ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flexp.config import OptimizerConfig
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.stage import carve
from flexp.models.zoo import save_tiny
from flexp.optim import Updater


def moved(config: OptimizerConfig, steps: int = 1, total: int | None = None) -> tuple[list[float], list[float]]:
    """How far a pretrained and a new weight go in each of the steps, on gradients of 1."""
    parameters = {name: nn.Parameter(torch.zeros(1, dtype=torch.float64)) for name in ("block", "classifier")}
    updater = Updater(parameters, config, total, new={"classifier"})
    places: tuple[list[float], list[float]] = ([], [])
    for _ in range(steps):
        before = [value.item() for value in parameters.values()]
        for value in parameters.values():
            value.grad = torch.ones_like(value)
        updater.step()
        for place, value, old in zip(places, parameters.values(), before, strict=True):
            place.append(old - value.item())
    return places


def test_new_weights_have_a_rate_of_their_own_on_the_same_schedule() -> None:
    config = OptimizerConfig(name="sgd", lr=0.5, new_lr=2.0, clip=None, schedule="linear")
    old, new = moved(config, steps=4, total=4)
    assert old == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert new == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_transposed_gradient_goes_where_it_belongs(name: str) -> None:
    """``torch.autograd.grad`` may give one, and a fused optimiser pairs elements by their place in memory."""
    config = OptimizerConfig.model_validate({"name": name, "lr": 0.5, "clip": None})
    mine, plain = (nn.Parameter(torch.arange(6.0).reshape(2, 3)) for _ in range(2))
    updater, gradient = Updater({"w": mine}, config), torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).T
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    other = cls([plain], lr=0.5, weight_decay=config.weight_decay)
    for step in range(3):
        mine.grad, plain.grad = gradient * (step + 1), (gradient * (step + 1)).contiguous()
        updater.step()
        other.step()
        updater.load(updater.state())
    assert torch.allclose(mine, plain, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_without_it_all_weights_have_one_rate(name: str) -> None:
    config = OptimizerConfig.model_validate({"name": name, "lr": 0.5, "clip": None})
    old, new = moved(config, steps=3)
    assert old == new
    assert old[0] == pytest.approx(0.5)


def test_a_stage_knows_what_no_checkpoint_holds(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path)
    whole = load_stage(folder, "sequence-classification", labels=["a", "b", "c"], pad_token_id=0)
    assert whole.new == {"score.weight"}
    assert carve(whole, Part.client((1, 4), whole.anatomy.blocks)).new == {"score.weight"}
    assert load_stage(folder, "causal-lm").new == frozenset()
