"""A process's own cut, and what of a limit is left for training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexp
from flexp.config import ModelConfig
from flexp.cost.choice import Choice
from flexp.cost.device import ARENA, OTHER_THREADS, Limit, for_training
from flexp.cost.model_cost import model_cost
from flexp.cost.predict import memory as least
from flexp.cost.profile import Profile
from flexp.errors import ConfigError
from flexp.models.anatomy import Part
from flexp.models.zoo import save_tiny
from flexp.planner import model as own
from flexp.planner.infeasible import InfeasibleError
from flexp.server import Server

from .tools import counted_on_tensors

MIB = 2**20


@pytest.fixture(autouse=True, scope="module")
def _counted_on_tensors() -> Iterator[None]:
    with counted_on_tensors():
        yield


def test_limits_that_count_reserves_leave_room_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexp.cost.device.soft_limit", lambda name: 8 * MIB)
    monkeypatch.setattr("flexp.cost.device.os.cpu_count", lambda: 2)
    threads = OTHER_THREADS + 4
    assert for_training(Limit("available memory", 1000 * MIB)) == 1000 * MIB
    assert for_training(Limit("RLIMIT_DATA", 1000 * MIB)) == (1000 - 8 * threads) * MIB
    assert for_training(Limit("RLIMIT_DATA", 1000 * MIB), threads=3) == (1000 - 8 * (threads + 2)) * MIB
    assert for_training(Limit("RLIMIT_AS", 1000 * MIB)) == (1000 - 8 * threads) * MIB - threads * ARENA
    assert for_training(Limit("RLIMIT_DATA", 5 * MIB)) == 0
    monkeypatch.setattr("flexp.cost.device.os.cpu_count", lambda: 64)
    assert for_training(Limit("RLIMIT_DATA", 1000 * MIB)) == (1000 - 8 * (OTHER_THREADS + 16)) * MIB


def memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    found = Profile.from_class("laptop").model_copy(update={"memory_bytes": size, "memory_from": "a test"})
    monkeypatch.setattr(own, "this_machine", lambda _: found)


def test_a_model_that_chooses_its_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny("bert", tmp_path / "model")
    server = Server.from_pretrained(folder, "sequence-classification", base_depth=1)
    memory(monkeypatch, 2**30)
    with caplog.at_level(logging.INFO, "flexp"):
        model = flexp.SplitModelForSequenceClassification.from_pretrained(
            folder, cut="auto", link=server.connect("a"), labels=["x", "y"], largest=(4, 16)
        )
    assert model.cut == own.own_cut(ModelConfig.of(folder), "sequence-classification", (4, 16))
    assert model.stage.part == Part.client(model.cut, 4)
    assert f"cut ({model.cut[0]}, {model.cut[1]}) planned" in caplog.text
    assert "that a test leaves" in caplog.text
    monkeypatch.setattr(type(model), "plan_cut", None)  # as where the class was not taken from flexp
    with pytest.raises(ConfigError, match=r"take the class from there"):
        type(model).from_pretrained(folder, cut="auto", link=server.connect("b"), labels=["x", "y"])


def test_a_limit_on_addresses_counts_the_map_of_the_embeddings_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig.of(save_tiny("bert", tmp_path / "model"), embeddings="file")
    cost = model_cost(model, "sequence-classification", length=16)
    memory(monkeypatch, round(1.15 * least(cost, Choice((1, 4), 4))) + 100)
    assert own.own_cut(model, "sequence-classification", (4, 16)) == (1, 4)
    monkeypatch.setattr(own, "maps_count", lambda: True)
    with pytest.raises(InfeasibleError, match="needs"):
        own.own_cut(model, "sequence-classification", (4, 16))
