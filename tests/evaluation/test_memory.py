"""The probe's client keeps and gets what a real one does; its peak itself is measured in the tests of whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexp.config import AlignConfig, ModelConfig, OptimizerConfig
from flexp.evaluation.echo import client_model, random_batch
from flexp.evaluation.memory import Probe, measure
from flexp.models.parts import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_model


def probe(**changes: Any) -> Probe:
    arguments: dict[str, Any] = {
        "model": "arch:bert",
        "kind": "sequence-classification",
        "cut": (3, 4),
        "examples": 2,
        "length": 6,
        "labels": None,
        "model_config": ModelConfig(id="arch:bert").model_dump(mode="json"),
        "optimizer": OptimizerConfig().model_dump(mode="json"),
    }
    return Probe(**{**arguments, **changes})


def made(**changes: Any) -> tuple[Any, list[Any], list[Any]]:
    """A probe's model after a step, and what crossed its link each way."""
    what = probe(**changes)
    stage = carve(Stage.whole(tiny_model("bert")), Part.client((3, 4), 4))
    tune(stage, "full")
    model = client_model(what, stage).train()
    up: list[Any] = []
    down: list[Any] = []
    for name in ("forward", "backward", "pull"):

        def call(request: Any, inner: Any = getattr(model.link, name)) -> Any:
            reply = inner(request)
            up.append(request)
            down.append(reply.result())
            return reply

        setattr(model.link, name, call)
    model(**random_batch(what, stage.model.config)).loss.backward()
    model.after_step()
    return model, up, down


def test_without_alignment_nothing_more_is_kept() -> None:
    model, up, down = made()
    assert up[0].base_BTH is None
    assert model.base_depth == 3
    assert len(up) == len(down) == 2


@pytest.mark.parametrize("at", ["cut", "every-block"])
def test_aligned_activations_are_kept_and_answered(at: str) -> None:
    align = AlignConfig(at=at).model_dump(mode="json")  # type: ignore[arg-type]
    _, up, down = made(align=align, base_depth=1)
    inner = 1 if at == "every-block" else 0  # after block 1; the one after block 2 is what is sent anyway
    assert up[0].base_BTH.shape == (2, 6, 32)
    assert [value.shape for value in up[0].inner_BTH] == [(2, 6, 32)] * inner
    assert [value.shape for value in down[1].inner_BTH] == [(2, 6, 32)] * inner
    assert down[0].align is not None


def test_pulled_weights_have_their_size() -> None:
    align = AlignConfig(kind="weights").model_dump(mode="json")
    model, up, down = made(align=align, base_depth=1)
    own = {name: value for name, value in model.stage.trainable().items() if model.stage.block_of(name) in (1, 2)}
    assert len(up) == 3
    assert down[2].weights.keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in down[2].weights.items())
    assert all(value.data_ptr() != own[name].data_ptr() for name, value in down[2].weights.items())


def test_a_process_of_its_own_measures_an_aligned_client() -> None:
    found = measure(probe(align=AlignConfig(kind="weights").model_dump(mode="json"), base_depth=1))
    assert found.peak >= found.loaded >= 0
