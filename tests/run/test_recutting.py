"""Devices that change in the middle of a run, and cuts that follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.errors import ConfigError
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.report.metrics import read
from flexp.run import runner
from flexp.run.settle import build_world
from tests.run.tools import copying
from tests.tiny import CLIENTS, bert_folder, checkpoint, config

NORTH, SOUTH, WEST = CLIENTS
FAST_THEN_SLOW: dict[str, Any] = {
    "assign": ["workstation"],
    "server": "slow-server",
    "classes": {
        "slow-server": {"base": "server", "flops": 1e6},
        "slow": {"base": "phone", "flops": 1e5},
        "none": {"base": "phone", "memory_bytes": 1_000_000},
    },
    "changes": [{"before_round": 2, "clients": [NORTH], "to": "slow"}],
}
ON = {"on": True, "gain": 0.05}


@pytest.fixture(scope="module", autouse=True)
def no_probes() -> Any:
    """Peak memory is not the matter here, and measuring it takes processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexp.run.costs.MemoryProbes.measure", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    bert_folder(place / "model", dropout=True)
    return place


def changing(folder: Path, recut: dict[str, Any], **devices: Any) -> Any:
    return config(
        folder,
        devices={**FAST_THEN_SLOW, **devices},
        recut=recut,
        train={"rounds": 3, "steps_per_round": 2, "batch_size": 4},
        output={"tensorboard": False, "html": False, "checkpoint_every": 1},
    )


def test_cuts_follow_the_devices_and_nobody_moves_without_need(folder: Path, tmp_path: Path) -> None:
    summary = runner.run(changing(folder, ON), tmp_path / "run")
    moves = [record for record in read(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "move"]
    rounds = {(record["client"], record["round"]) for record in moves}
    assert (NORTH, 2) in rounds
    assert not any(number == 3 for _, number in rounds)  # nothing changed any more
    of_north = [record for record in moves if record["client"] == NORTH]
    assert of_north[-1]["cut"][0] < of_north[-1]["before"][0]  # on a phone it keeps less
    cuts = {client["name"]: client["cut"] for client in summary["clients"]}
    assert cuts[NORTH] == of_north[-1]["cut"]
    ends = summary["virtual"]["rounds"]
    assert ends == sorted(ends)
    assert len(ends) == 3


def test_the_clock_without_moves_is_slower(folder: Path, tmp_path: Path) -> None:
    """Deep cuts on a device that has become slow take longer than those that follow it."""
    base = changing(folder, {}, changes=[{"before_round": 2, "to": "slow"}],
                    classes={"slow": {"base": "phone", "flops": 1e6}}, server="server")  # fmt: skip
    clients = base.data.clients
    base = base.with_clients(clients.written(CLIENTS, cut=[(3, 4)] * len(CLIENTS)))
    still = runner.run(base, tmp_path / "still")
    moved = runner.run(base.model_copy(update={"recut": base.recut.model_copy(update={"on": True})}), tmp_path / "on")
    assert {tuple(client["cut"]) for client in still["clients"]} == {(3, 4)}
    assert moved["virtual"]["rounds"][-1] < 0.7 * still["virtual"]["rounds"][-1]


def test_resumed_after_a_move_equals_undisturbed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = changing(folder, ON, changes=[
        {"before_round": 2, "clients": [NORTH], "to": "slow"},
        {"before_round": 3, "clients": [NORTH], "to": "workstation"},
    ])  # fmt: skip
    stopped = tmp_path / "stopped"
    copying(monkeypatch, tmp_path / "whole", stopped, 3)  # after the moves of rounds 2 and 3
    runner.run(settings, tmp_path / "whole")
    wanted = checkpoint(tmp_path / "whole")

    runner.resume(stopped)
    got = checkpoint(stopped)
    moves = [record for record in read(stopped / "metrics.jsonl") if record["kind"] == "move"]
    assert [record["restored"] != [] for record in moves if record["client"] == NORTH][-1]  # blocks came back
    for party, state in wanted.items():
        timeless = {k: v for k, v in state.items() if "seconds" not in k and not k.startswith("meter/")}
        assert timeless.keys() <= got[party].keys()
        assert all(torch.equal(value, got[party][name]) for name, value in timeless.items()), party


def test_a_client_whose_device_cannot_hold_it_stops_and_comes_back(folder: Path, tmp_path: Path) -> None:
    settings = changing(folder, {}, changes=[
        {"before_round": 2, "clients": [SOUTH], "to": "none"}, {"before_round": 3, "to": "laptop"},
    ])  # fmt: skip
    runner.run(settings, tmp_path / "run")
    records = read(tmp_path / "run" / "metrics.jsonl")
    steps = {(record["client"], record["round"]) for record in records if record["kind"] == "step"}
    assert (SOUTH, 2) not in steps
    assert {(SOUTH, 1), (SOUTH, 3), (WEST, 2)} <= steps
    told = [(record["round"], record["there"]) for record in records if record["kind"] == "presence"]
    assert told == [(2, False), (3, True)]


def test_moves_leave_a_server_that_has_all_blocks(folder: Path) -> None:
    world = build_world(changing(folder, ON))
    assert FlexpSfl(world).server.blocks == (1, 4)


def test_bad_changes_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no client 'nobody'"):
        runner.run(changing(folder, {}, changes=[{"before_round": 2, "clients": ["nobody"], "to": "phone"}]), tmp_path)
    with pytest.raises(ConfigError, match="device class 'tablet' is not known"):
        runner.run(changing(folder, {}, changes=[{"before_round": 2, "to": "tablet"}]), tmp_path)
    with pytest.raises(ConfigError, match=r"recut.on needs a method that moves cuts"):
        config(folder, method={"name": "fedavg"}, recut={"on": True})
