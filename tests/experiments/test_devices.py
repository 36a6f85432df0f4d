"""A run on devices: who is left out and why, what it writes down, and how measured work becomes the clock's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexp.devices.cost import Costs, ExchangeCost
from flexp.errors import ConfigError
from flexp.evaluation import memory
from flexp.evaluation.memory import Measured, Probe
from flexp.experiments import runner
from flexp.experiments.devices import client_work
from flexp.experiments.memory import MemoryProbes
from flexp.experiments.setup import build_world
from flexp.links.base import Traffic
from flexp.methods import METHODS, World
from flexp.methods.base import Account
from flexp.methods.fedrep import FedRep
from flexp.report.metrics import read

from .tiny import CLIENTS, config

MB = 10**6
DEVICES: dict[str, Any] = {
    "assign": ["phone", "laptop"],
    "server": "workstation",
    "classes": {"phone": {"memory_bytes": 100 * MB}},
}
NORTH, SOUTH, WEST = CLIENTS  # on a phone, a laptop, and a phone


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """What was measured; a whole model takes 200 MB, a part 20 for each of its blocks."""
    probes: list[Probe] = []

    def fake(probe: Probe, timeout: float) -> Measured:
        probes.append(probe)
        return Measured(loaded=1, peak=200 * MB if probe.cut is None else 20 * MB * probe.cut[0])

    monkeypatch.setattr(memory, "measure", fake)
    return probes


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> list[World]:
    """The worlds that methods were given."""
    seen: list[World] = []
    for name, make in METHODS.items():

        def watched(world: World, make: Any = make) -> Any:
            seen.append(world)
            return make(world)

        monkeypatch.setitem(METHODS, name, watched)
    return seen


def test_devices_that_cannot_hold_the_method_are_left_out(
    home: Path, measured: list[Probe], worlds: list[World]
) -> None:
    summary = runner.run(config(home, method={"name": "fedavg"}, devices=DEVICES), home / "out")
    assert worlds[0].absent == {NORTH, WEST}
    assert [data.name for data in worlds[0].participants] == [SOUTH]
    assert summary["dropped"] == [
        {"name": name, "device": "phone", "needed_bytes": 200 * MB, "available_bytes": 100 * MB}
        for name in (NORTH, WEST)
    ]
    notes = " ".join(worlds[0].federation.notes)
    assert "north is left out of fedavg: needs 200 MB to train, and its phone has 100 MB" in notes
    assert list(summary["virtual"]["clients"]) == [SOUTH]
    assert summary == json.loads((home / "out/summary.json").read_text(encoding="utf-8"))


def test_who_cuts_shallow_enough_takes_part(home: Path, measured: list[Probe], worlds: list[World]) -> None:
    summary = runner.run(config(home, devices=DEVICES), home / "out")  # at most 60 MB
    assert worlds[0].absent == frozenset()
    assert summary["dropped"] == []
    clients = {client["name"]: client for client in summary["clients"]}
    assert [clients[name]["device"] for name in CLIENTS] == ["phone", "laptop", "phone"]
    assert [clients[name]["peak_memory_bytes"] for name in CLIENTS] == [20 * MB, 40 * MB, 60 * MB]
    assert len(measured) == 3
    world = build_world(config(home))
    for name in CLIENTS:
        cost = Costs(world).of(name)
        assert clients[name]["client_flops"] == pytest.approx(6 * cost.client_step)  # 3 rounds of 2 steps
        assert clients[name]["server_flops"] == pytest.approx(6 * cost.server_step)
    virtual = summary["virtual"]
    assert len(virtual["rounds"]) == 3
    assert virtual["rounds"] == sorted(virtual["rounds"])
    assert virtual["rounds"][-1] == max(time["finished"] for time in virtual["clients"].values())
    assert virtual["clients"][NORTH]["transmitting"] > 0.0


def test_without_devices_nothing_is_said_of_them(home: Path, worlds: list[World]) -> None:
    summary = runner.run(config(home), home / "out")
    assert "virtual" not in summary
    assert "dropped" not in summary
    assert "device" not in summary["clients"][0]
    assert worlds[0].absent == frozenset()


def test_nobody_left_is_refused_before_anything_is_written(home: Path, measured: list[Probe]) -> None:
    devices = {**DEVICES, "assign": ["phone"]}
    with pytest.raises(ConfigError, match=r"no client can take part in fedavg: .* needs 200 MB .* phone has 100 MB"):
        runner.run(config(home, method={"name": "fedavg"}, devices=devices), home / "out")
    assert not (home / "out").exists()


def test_an_unknown_class_is_refused_before_anything_is_measured(home: Path, measured: list[Probe]) -> None:
    for devices in ({**DEVICES, "server": "mainframe"}, {**DEVICES, "assign": ["mainframe"]}):
        with pytest.raises(ConfigError, match="device class 'mainframe' is not known"):
            runner.run(config(home, devices=devices), home / "out")
    assert not measured


def test_what_could_not_be_measured_takes_part_and_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(probe: Probe, timeout: float) -> Measured:
        raise memory.FlexpError("no such kernel")

    monkeypatch.setattr(memory, "measure", fail)
    summary = runner.run(config(home, method={"name": "local"}, devices=DEVICES), home / "out")
    assert summary["dropped"] == []
    assert summary["clients"][0]["peak_memory_bytes"] is None


def test_a_resumed_run_leaves_out_the_same_clients(home: Path, measured: list[Probe], worlds: list[World]) -> None:
    run = config(home, method={"name": "fedavg"}, devices=DEVICES)
    whole = runner.run(run, home / "whole")
    runner.run(run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1})}), home / "out")
    (home / "out/config.json").write_text(json.dumps(run.resolved()), encoding="utf-8")
    before = len(measured)
    resumed = runner.resume(home / "out")
    assert len(measured) == before
    assert worlds[-1].absent == {NORTH, WEST}
    assert resumed["virtual"] == whole["virtual"]
    assert resumed["dropped"] == whole["dropped"]


def test_runs_share_their_measurements(home: Path, measured: list[Probe]) -> None:
    for name in ("one", "two"):
        runner.run(config(home, devices=DEVICES, train={"rounds": 1}), home / name, memory_cache=home / "cache")
    assert len(measured) == 3
    assert json.loads((home / "one/memory.json").read_text()) == json.loads((home / "two/memory.json").read_text())


def test_the_diary_has_the_seconds_of_clients(home: Path) -> None:
    summary = runner.run(config(home), home / "out")
    rounds = [record for record in read(home / "out/metrics.jsonl") if record["kind"] == "round"]
    for record in rounds:
        seconds = record["seconds_by_client"]
        assert list(seconds) == list(CLIENTS)
        assert record["client_seconds"] == pytest.approx(sum(seconds.values()) / 3)
    spent = {client["name"]: client["client_seconds"] for client in summary["clients"]}
    assert rounds[-1]["seconds_by_client"] == spent
    assert rounds[0]["client_seconds"] < rounds[-1]["client_seconds"]


@pytest.mark.parametrize(
    ("name", "own", "weights", "optimizers"),
    [
        ("local", {}, 0, 0),
        ("fedprox", {}, 1, 0),
        ("pfedme", {}, 1, 0),
        ("ditto", {}, 2, 1),
        ("apfl", {}, 2, 1),
        ("per-fedavg", {}, 1, 0),
        ("per-fedavg", {"variant": "hessian-free"}, 3, 0),
        ("per-fedavg", {"alpha": 0.0}, 0, 0),
        ("fedrep", {}, 0, 0),
    ],
)
def test_probes_hold_what_methods_hold(
    home: Path, measured: list[Probe], name: str, own: dict[str, Any], weights: int, optimizers: int
) -> None:
    table = {"name": name, name.replace("-", "_"): own} if own else {"name": name}
    world = build_world(config(home, method=table, evaluation={"measure_memory": True}))
    probes = MemoryProbes(world, home / "out")
    probes.measure(lambda note: None)
    assert [(probe.cut, probe.extra_weights, probe.extra_optimizers) for probe in measured] == [
        (None, weights, optimizers)
    ]
    assert probes.peak(NORTH) == 200 * MB


@pytest.mark.parametrize("name", ["centralized", "pretrained"])
def test_where_no_client_trains_nothing_is_measured(home: Path, measured: list[Probe], name: str) -> None:
    summary = runner.run(config(home, method={"name": name}, devices=DEVICES), home / "out")
    assert not measured
    assert summary["dropped"] == []
    assert summary["virtual"] is None
    assert summary["clients"][0]["client_flops"] == 0.0


COST = ExchangeCost(10.0, 20.0, 30.0, 40.0, 50.0, 300, 200, 100, 200, weights=1000, exchanges=2)


def account(up: int, down: int, evaluations: int = 0) -> Account:
    return Account(0, Traffic(bytes_up=up, bytes_down=down), Traffic(), 0.0, 0.0, evaluations)


def test_metered_bytes_are_spread_over_the_clocks_messages() -> None:
    work = client_work(COST, account(16_000, 8_000), [4, 4], "split-async")  # 16 exchanges
    assert (work.forward_up, work.backward_up) == (750.0, 250.0)
    assert (work.forward_down, work.backward_down) == (250.0, 250.0)
    assert (work.weights_up, work.weights_down) == (0.0, 0.0)
    both = client_work(COST, account(18_000, 10_000), [4, 4], "split-sync")
    assert (both.forward_up, both.backward_down, both.weights_up) == (750.0, 250.0, 1000.0)
    pulled = client_work(replace(COST, pull_down=500), account(16_000, 10_000), [4, 4], "split-async", pull_every=2)
    assert (pulled.forward_down, pulled.pull_down, pulled.pull_every) == (250.0, 500.0, 2)
    whole = client_work(COST, account(800, 600, evaluations=11), [4, 4], "synchronous")
    assert (whole.weights_up, whole.weights_down, whole.final) == (400.0, 300.0, 3 * 120.0)


def test_two_phases_cost_less_than_whole_steps(home: Path, measured: list[Probe]) -> None:
    devices = {"assign": ["laptop"]}
    flops = {}
    for name in ("fedavg", "fedrep"):
        summary = runner.run(config(home, method={"name": name}, devices=devices), home / name)
        flops[name] = summary["clients"][0]["client_flops"]
    assert 0.5 * flops["fedavg"] < flops["fedrep"] < 0.8 * flops["fedavg"]  # half of the steps: a forward, hardly more
    assert isinstance(METHODS["fedrep"](build_world(config(home, method={"name": "fedrep"}))), FedRep)


def test_fine_tuning_at_the_end_is_timed(home: Path, measured: list[Probe]) -> None:
    """Two of the six gradient evaluations are the adaptation: the sum is FedAvg's."""
    devices = {"assign": ["laptop"]}
    flops = {}
    for name in ("fedavg", "fedavg-ft"):
        summary = runner.run(config(home, method={"name": name}, devices=devices), home / name)
        flops[name] = summary["clients"][0]["client_flops"]
    assert flops["fedavg-ft"] == pytest.approx(flops["fedavg"])
