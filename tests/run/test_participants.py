"""A run on devices: who is left out and why, what it writes down, and how measured work becomes the clock's."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexp.cost import probe as memory
from flexp.cost.choice import ExchangeCost
from flexp.cost.clock import SPLIT_ASYNC, SPLIT_SYNC, SYNCHRONOUS, Schedule
from flexp.cost.probe import Measured, Probe
from flexp.errors import ConfigError
from flexp.links.base import Traffic
from flexp.methods import METHODS, World
from flexp.methods.base import Account
from flexp.methods.fedrep import FedRep
from flexp.report.metrics import read
from flexp.run import runner
from flexp.run.costs import Costs, MemoryProbes
from flexp.run.participants import NobodyFitsError
from flexp.run.settle import build_world
from flexp.run.virtual import client_work
from tests.run.tools import copying
from tests.tiny import CLIENTS, CUTS, bert_folder, config, each

MB = 10**6
DEVICES: dict[str, Any] = {
    "assign": ["phone", "laptop"],
    "server": "workstation",
    "classes": {"phone": {"memory_bytes": 100 * MB}},
}
SHORT = {"rounds": 1}
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
    for method in METHODS.values():

        def watched(self: Any, world: World, make: Any = method.__init__) -> None:
            seen.append(world)
            make(self, world)

        monkeypatch.setattr(method, "__init__", watched)
    return seen


def test_devices_that_cannot_hold_the_method_are_left_out(
    home: Path, measured: list[Probe], worlds: list[World]
) -> None:
    summary = runner.run(config(home, method={"name": "fedavg"}, devices=DEVICES, train=SHORT), home / "out")
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
    summary = runner.run(config(home, devices=DEVICES, train={"rounds": 2}), home / "out")  # at most 60 MB
    assert worlds[0].absent == frozenset()
    assert summary["dropped"] == []
    clients = {client["name"]: client for client in summary["clients"]}
    assert [clients[name]["device"] for name in CLIENTS] == ["phone", "laptop", "phone"]
    assert [clients[name]["peak_memory_bytes"] for name in CLIENTS] == [20 * MB, 40 * MB, 60 * MB]
    assert len(measured) == 3
    world = build_world(config(home))
    for name in CLIENTS:
        cost = Costs(world).of(name)
        assert clients[name]["client_flops"] == pytest.approx(4 * cost.client_step)  # 2 rounds of 2 steps
        assert clients[name]["server_flops"] == pytest.approx(4 * cost.server_step)
    virtual = summary["virtual"]
    assert len(virtual["rounds"]) == 2
    assert virtual["rounds"] == sorted(virtual["rounds"])
    assert virtual["rounds"][-1] == max(time["finished"] for time in virtual["clients"].values())
    assert virtual["clients"][NORTH]["transmitting"] > 0.0


@pytest.mark.parametrize(
    ("name", "own", "cut", "peak"),
    [
        ("split-fedavg", {}, [1, 4], 20),
        ("splitfed-v1", {}, [1, 4], 20),
        ("splitfed-v2", {"splitfed": {"cut": 2}}, [2, 4], 40),
        ("splitlora", {"splitlora": {"cut": 2}}, [2, 4], 40),
    ],
)
def test_a_method_with_one_cut_is_measured_at_it(
    home: Path, measured: list[Probe], worlds: list[World], name: str, own: dict[str, Any], cut: list[int], peak: int
) -> None:
    """West is configured to cut at 3, 60 MB: more than its phone has; but not in a method that cuts at 1 or 2."""
    devices = {**DEVICES, "classes": {"phone": {"memory_bytes": 50 * MB}}}
    model = {"tuning": "lora"} if name == "splitlora" else {}
    run = config(home, model=model, method={"name": name, **own}, devices=devices, train={"rounds": 1})
    summary = runner.run(run, home / "out")
    assert worlds[0].absent == frozenset()
    assert [client["cut"] for client in summary["clients"]] == [cut] * 3
    assert [client["peak_memory_bytes"] for client in summary["clients"]] == [peak * MB] * 3
    assert [list(probe.cut or ()) for probe in measured] == [cut]
    assert len({client["client_flops"] for client in summary["clients"]}) == 1


def test_adapters_are_measured_at_the_clients_rank(home: Path, measured: list[Probe]) -> None:
    world = build_world(
        config(
            home,
            model={"tuning": "lora"},
            method={"name": "hetlora"},
            data={"clients": each(cut=CUTS, rank=[2, 16])},
            evaluation={"measure_memory": True},
        )
    )
    probes = MemoryProbes(world, home / "out")
    probes.measure(lambda note: None)
    assert [probe.model_config["lora"]["rank"] for probe in measured] == [2, 16]
    assert list(probes.found) == ["whole, rank 2", "whole, rank 16"]
    assert probes.peak(WEST) == probes.peak(NORTH) == 200 * MB
    measured.clear()
    split = {"name": "splitft", "splitft": {"cut_rank": 3}}
    world = build_world(config(home, model={"tuning": "lora"}, method=split, evaluation={"measure_memory": True}))
    MemoryProbes(world, home / "out").measure(lambda note: None)
    # Cuts (1, 4), (2, 4) and (3, 4) of four blocks: nobody has a block at e.
    assert [dict(probe.ranks) for probe in measured] == [{0: 3}, {1: 3}, {2: 3}]
    assert {probe.model_config["lora"]["rank"] for probe in measured} == {8}


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (2, 2)])
def test_no_more_probes_at_once_than_threads(
    home: Path, monkeypatch: pytest.MonkeyPatch, threads: int, most: int
) -> None:
    """In a comparison each worker has its share of the cores, and the others measure as well."""
    lock, seen, running = threading.Lock(), [], 0

    def slow(probe: Probe, timeout: float) -> Measured:
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return Measured(1, 2)

    monkeypatch.setattr(memory, "measure", slow)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    world = build_world(config(home, threads=threads, evaluation={"measure_memory": True}))
    MemoryProbes(world, home / "out").measure(lambda note: None)
    assert (len(seen), max(seen)) == (3, most)


def test_without_devices_nothing_is_said_of_them(home: Path, worlds: list[World]) -> None:
    summary = runner.run(config(home, train=SHORT), home / "out")
    assert "virtual" not in summary
    assert "dropped" not in summary
    assert "device" not in summary["clients"][0]
    assert worlds[0].absent == frozenset()


def test_nobody_left_is_refused_before_anything_is_written(home: Path, measured: list[Probe]) -> None:
    devices = {**DEVICES, "assign": ["phone"]}
    with pytest.raises(
        NobodyFitsError, match=r"no client can take part in fedavg: .* needs 200 MB .* has 100 MB"
    ) as it:
        runner.run(config(home, method={"name": "fedavg"}, devices=devices), home / "out")
    assert [client["name"] for client in it.value.dropped] == list(CLIENTS)
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
    summary = runner.run(config(home, method={"name": "local"}, devices=DEVICES, train=SHORT), home / "out")
    assert summary["dropped"] == []
    assert summary["clients"][0]["peak_memory_bytes"] is None


def test_a_resumed_run_leaves_out_the_same_clients(
    home: Path, measured: list[Probe], worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(home, method={"name": "fedavg"}, devices=DEVICES, train={"rounds": 2})
    copying(monkeypatch, home / "whole", home / "out")
    whole = runner.run(run, home / "whole")
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
    summary = runner.run(config(home, train={"rounds": 2}), home / "out")
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
    summary = runner.run(config(home, method={"name": name}, devices=DEVICES, train=SHORT), home / "out")
    assert not measured
    assert summary["dropped"] == []
    assert summary["virtual"] is None
    assert "client_flops" not in summary["clients"][0]  # not counted, which is not zero


def test_a_change_that_never_comes_is_told(home: Path, measured: list[Probe], worlds: list[World]) -> None:
    changes = [{"before_round": number, "to": "laptop"} for number in (2, 9)]
    summary = runner.run(config(home, devices={**DEVICES, "changes": changes}, train={"rounds": 2}), home / "out")
    assert summary["finished"]
    told = [note for note in worlds[0].federation.notes if "never comes" in note]
    assert told == ["devices.changes: there is no round 9 in a run of 2, so that change never comes"]


def test_what_a_server_keeps_is_known_whatever_changes_elsewhere(home: Path, measured: list[Probe]) -> None:
    """An epoch has three steps; a change of another client's device began it anew for everybody."""
    bert_folder(home / "model")  # without dropout
    kept = {
        "method": {"align": {"kind": "off"}, "personal": {"frozen_head_blocks": 1}},
        "data": {"clients": {"cut": [1, None]}},
        "link": {"cache": "memory"},
        "train": {"rounds": 4, "steps_per_round": 2, "batch_size": 4},
    }
    devices = {"assign": ["laptop"], "server": "workstation"}
    changes = [{"before_round": number, "clients": [WEST], "to": to} for number, to in ((2, "phone"), (4, "laptop"))]
    flops = {}
    for name, own in (("plain", devices), ("changed", devices | {"changes": changes})):
        summary = runner.run(config(home, devices=own, **kept), home / name)
        flops[name] = [client["client_flops"] for client in summary["clients"]]
    cost = Costs(build_world(config(home, **kept))).of(NORTH)
    assert (cost.epoch, cost.later_up is None) == (3, False)
    saved = 5 * cost.exchanges * (cost.before - cost.later_before)
    assert saved > 0
    assert flops["plain"][0] == pytest.approx(8 * cost.client_step - saved)
    assert flops["changed"] == pytest.approx(flops["plain"])


COST = ExchangeCost(10.0, 20.0, 30.0, 40.0, 50.0, 300, 200, 100, 200, weights=1000, exchanges=2)


def account(up: int, down: int, evaluations: int = 0) -> Account:
    return Account(0, Traffic(bytes_up=up, bytes_down=down), Traffic(), 0.0, 0.0, evaluations)


def test_metered_bytes_are_spread_over_the_clocks_messages() -> None:
    work = client_work(COST, account(16_000, 8_000), [4, 4], SPLIT_ASYNC)  # 16 exchanges
    assert (work.forward_up, work.backward_up) == (750.0, 250.0)
    assert (work.forward_down, work.backward_down) == (250.0, 250.0)
    assert (work.weights_up, work.weights_down) == (0.0, 0.0)
    both = client_work(COST, account(18_000, 10_000), [4, 4], SPLIT_SYNC)
    assert (both.forward_up, both.backward_down, both.weights_up) == (750.0, 250.0, 1000.0)
    pulled = client_work(
        replace(COST, pull_down=500), account(16_000, 10_000), [4, 4], Schedule("split-async", pull_every=2)
    )
    assert (pulled.forward_down, pulled.pull_down, pulled.pull_every) == (250.0, 500.0, 2)
    rare = client_work(COST, account(16_000 + 1000, 8_000 + 2000), [3, 3, 2], Schedule("split-sync", average_every=2))
    assert (rare.forward_up, rare.backward_down, rare.weights_up, rare.weights_every) == (750.0, 250.0, 1000.0, 2)
    whole = client_work(COST, account(800, 600, evaluations=11), [4, 4], SYNCHRONOUS)
    assert (whole.weights_up, whole.weights_down, whole.final) == (400.0, 300.0, 3 * 120.0)


def test_two_phases_cost_less_than_whole_steps(home: Path, measured: list[Probe]) -> None:
    devices = {"assign": ["laptop"]}
    flops = {}
    for name in ("fedavg", "fedrep"):
        summary = runner.run(config(home, method={"name": name}, devices=devices, train=SHORT), home / name)
        flops[name] = summary["clients"][0]["client_flops"]
    assert 0.5 * flops["fedavg"] < flops["fedrep"] < 0.8 * flops["fedavg"]  # half of the steps: a forward, hardly more
    assert isinstance(METHODS["fedrep"](build_world(config(home, method={"name": "fedrep"}))), FedRep)


def test_fine_tuning_at_the_end_is_timed(home: Path, measured: list[Probe]) -> None:
    """Two of the four gradient evaluations are the adaptation: the sum is FedAvg's."""
    devices = {"assign": ["laptop"]}
    flops = {}
    for name in ("fedavg", "fedavg-ft"):
        summary = runner.run(config(home, method={"name": name}, devices=devices, train={"rounds": 2}), home / name)
        flops[name] = summary["clients"][0]["client_flops"]
    assert flops["fedavg-ft"] == pytest.approx(flops["fedavg"])
