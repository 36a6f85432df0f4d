"""A process's own cut, and what of a limit is left for training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flexp
from flexp.config import ModelConfig
from flexp.cost.choice import Choice
from flexp.cost.device import ARENA, OTHER_THREADS, Limit, for_training
from flexp.cost.memory import memory as least
from flexp.cost.model_cost import model_cost
from flexp.cost.profile import Profile
from flexp.errors import ConfigError
from flexp.models.anatomy import Part
from flexp.models.zoo import save_tiny
from flexp.planner import model as own
from flexp.planner.fleet import Choices, TaskShape
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


def test_the_server_is_planned_as_its_own_blocks_are_quantised(tmp_path: Path) -> None:
    """Not as the clients'; what a client takes is its own matter."""
    folder, device, choice = save_tiny("llama", tmp_path), Profile.from_class("laptop"), Choice((1, 3), 4, rank=4)

    def costs(quantization: Any, server: Any = None) -> own.ModelCosts:
        task = TaskShape(
            kind="causal-lm", length=16, tuning="lora", quantization=quantization, server_quantization=server
        )
        return own.ModelCosts(str(folder), task, Choices(), device)

    in_file = TaskShape(kind="causal-lm", length=16, tuning="lora", blocks="file")
    known = costs("off")  # of blocks in memory, which are others
    assert known.memory(in_file, choice) < known.memory(known.task, choice)
    plain, packed, mixed, other = costs("off"), costs("nf4"), costs("nf4", "off"), costs("off", "nf4")
    assert mixed.block_bytes(4) == plain.block_bytes(4) > packed.block_bytes(4) == other.block_bytes(4)
    for one, client, server in ((mixed, packed, plain), (other, plain, packed)):
        found = one.predict(device, choice)
        assert found.memory_bytes == client.predict(device, choice).memory_bytes
        assert found.server_memory_bytes == server.predict(device, choice).server_memory_bytes
