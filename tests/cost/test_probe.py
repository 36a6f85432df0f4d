"""The probe's client keeps and gets what a real one does; its peak itself is measured in the tests of whole runs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexp.config import AlignConfig, ModelConfig, OptimizerConfig
from flexp.cost import probe as memory
from flexp.cost.echo import client_model, random_batch, without_tail
from flexp.cost.probe import Measured, Probe, measure_once
from flexp.models.anatomy import Part
from flexp.models.loading import load_stage
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.models.zoo import tiny_model

from .tools import warmly


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
    tune(stage, ModelConfig(id="any"))
    model = client_model(what, stage).train()
    up: list[Any] = []
    down: list[Any] = []
    inner = model.link.call

    def call(request: Any) -> Any:
        reply = inner(request)
        up.append(request)
        down.append(reply.result())
        return reply

    model.link.call = call
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
    align = AlignConfig(kind="kl", at=at).model_dump(mode="json")  # type: ignore[arg-type]
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
    """Also when only what its memory depends on is left of the probe."""
    found = warmly(memory.plain(probe(align=AlignConfig(kind="weights").model_dump(mode="json"), base_depth=1)))
    assert found.peak >= found.loaded >= 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT whose trained weights (50 MB) dwarf whatever else a process holds."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    config: Any = tiny_model("bert").config
    config.update({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4})
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def peak(model: str) -> int:
    """Of a client that holds all of it."""
    return warmly(probe(model=model, cut=None)).peak


def test_extra_copies_and_optimisers_are_really_held(model: str, peak: int) -> None:
    """A weight copy is as large as what is trained, a second AdamW twice that; the peak rises by just as much."""
    trained = 4 * sum(value.numel() for value in tuned(model).trainable().values())
    assert trained > 40e6
    more = warmly(probe(model=model, cut=None, extra_weights=3, extra_optimizers=1)).peak
    assert more - peak == pytest.approx((3 + 2 * 1) * trained, rel=0.08)


def test_a_client_without_a_tail_holds_its_first_blocks_only(model: str, peak: int) -> None:
    start = warmly(probe(model=model, cut=(1, 4), tail=False)).peak
    assert 0.1 * peak < start < 0.5 * peak  # one block of four


def tuned(model: str) -> Stage:
    stage = load_stage(model, "sequence-classification")
    tune(stage, ModelConfig(id="any"))
    return stage


def test_the_start_of_a_model_trains_what_is_below_the_cut() -> None:
    what = probe(cut=(2, 4), tail=False)
    stage = carve(Stage.whole(tiny_model("bert")), Part.client((2, 4), 4))
    tune(stage, ModelConfig(id="any"))
    kept = list(without_tail(stage))
    assert {stage.block_of(name) for name in stage.trainable()} == {0, 1}
    assert {id(value) for value in stage.trainable().values()} < {id(value) for value in kept}
    model = client_model(what, stage).train()
    model(**random_batch(what, stage.model.config)).loss.backward()
    assert all(value.grad is not None for value in stage.trainable().values())


def test_equal_probes_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Probe] = []

    def fake(what: Probe, timeout: float) -> Measured:
        measured.append(what)
        return Measured(loaded=len(measured), peak=10)

    monkeypatch.setattr(memory, "measure", fake)
    cache = tmp_path / "cache"
    first = measure_once(probe(), cache)
    assert measure_once(probe(), cache) == first == Measured(loaded=1, peak=10)
    assert measure_once(probe(examples=3), cache) == Measured(loaded=2, peak=10)
    assert measure_once(probe(extra_weights=1), cache) == Measured(loaded=3, peak=10)
    assert len(measured) == 3
    assert measure_once(probe(), None) == Measured(loaded=4, peak=10)


def optimizer(**changes: Any) -> dict[str, Any]:
    return OptimizerConfig(**changes).model_dump(mode="json")


def align(**changes: Any) -> dict[str, Any]:
    return AlignConfig(**{"kind": "kl", **changes}).model_dump(mode="json")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"optimizer": optimizer(lr=1e-4)},
            {"optimizer": optimizer(lr=0.1, new_lr=1.0, schedule="linear", warmup_steps=9)},
        ),
        (
            {"base_depth": 1, "align": align(weight=0.25)},
            {"base_depth": 1, "align": align(weight=1.0, temperature=2.0, normalize=True, combine="project")},
        ),
        ({"base_depth": 3, "align": align()}, {"base_depth": 3}),  # s = s_min: there is nothing to align
        ({"base_depth": 1, "align": align(kind="off")}, {}),
        ({"base_depth": 1, "align": align(weight=0.0)}, {}),
        (
            {"base_depth": 1, "align": align(kind="weights", pull=0.1)},
            {"base_depth": 1, "align": align(kind="weights", pull=0.5)},
        ),
    ],
)
def test_what_no_memory_depends_on_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: dict[str, Any], other: dict[str, Any]
) -> None:
    measured: list[Probe] = []
    monkeypatch.setattr(memory, "measure", lambda what, timeout: measured.append(what) or Measured(1, 2))
    for changes in (one, other):
        measure_once(probe(**changes), tmp_path)
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"optimizer": optimizer()}, {"optimizer": optimizer(name="sgd")}),
        ({"base_depth": 1, "align": align()}, {"base_depth": 1, "align": align(at="every-block")}),
        ({"base_depth": 1, "align": align()}, {"base_depth": 2, "align": align()}),
        ({"base_depth": 1, "align": align(kind="off")}, {"base_depth": 1, "align": align(kind="off", teach=True)}),
        (
            {"base_depth": 1, "align": align(kind="weights", teach=True)},
            {"base_depth": 1, "align": align(kind="weights", teach=True, follow=True)},
        ),
        ({}, {"ranks": ((0, 4),)}),
    ],
)
def test_what_memory_depends_on_is_measured_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: dict[str, Any], other: dict[str, Any]
) -> None:
    measured: list[Probe] = []
    monkeypatch.setattr(memory, "measure", lambda what, timeout: measured.append(what) or Measured(1, 2))
    for changes in (one, other):
        measure_once(probe(**changes), tmp_path)
    assert len(measured) == 2
    monkeypatch.setattr(memory, "VERSION", memory.VERSION + 1)
    measure_once(probe(**one), tmp_path)
    assert len(measured) == 3


def test_two_processes_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second waits for the first one's result."""
    running = most = 0

    def slow(what: Probe, timeout: float) -> Measured:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        return Measured(1, 2)

    monkeypatch.setattr(memory, "measure", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: measure_once(probe(), tmp_path), range(4)))
    assert found == [Measured(1, 2)] * 4
    assert most == 1
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert not list(tmp_path.glob("*.part"))
