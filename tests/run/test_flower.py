"""A run whose clients Flower starts has the weights of the simulation. The apps are Flower's own; what carries messages
between them is not, here: ``make flower-demo`` has that."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flexp.run import runner
from tests import tiny
from tests.harness import equal

from .tools import parties, without_meters

pytest.importorskip("flwr", reason="Flower is an extra")

from flexp.cli.flower import new
from flexp.errors import ConfigError
from flexp.flower import client_app, server_app

NAMES = list(tiny.CLIENTS)


class Grid:
    """A node for each client of the run, in this process; ``falls``: a node whose first ClientApp fails."""

    def __init__(self, state: Path, falls: int = -1) -> None:
        self.state, self.falls, self.started = state, falls, list[int]()
        self._pool, self._replies = ThreadPoolExecutor(8), dict[str, Future[Any]]()

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3] if self.started else [1, 2]  # the third comes late

    def push_messages(self, messages: list[Any]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id + str(len(self.started))
            self._replies[message.metadata.message_id] = self._pool.submit(self._node, message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        return [self._replies[number].result() for number in ids if self._replies[number].done()]

    def _node(self, message: Any) -> Any:
        from flwr.app import Context, Error, Message, RecordDict

        node = message.metadata.dst_node_id
        self.started.append(node)
        if node == self.falls and self.started.count(node) == 1:
            return Message(Error(code=1, reason="it fell"), reply_to=message)
        own = {"partition-id": node - 1, "num-partitions": 3, "state": str(self.state / "clients")}
        try:
            return client_app()(message, Context(1, node, own, RecordDict(), {}))
        except Exception as error:
            return Message(Error(code=1, reason=repr(error)), reply_to=message)


def written(home: Path, **deployment: Any) -> Path:
    """An app of the tiny run."""
    train = {"rounds": 2, "steps_per_round": 2}
    content = tiny.content(home, train=train, model={"base_depth": 1}, deployment=deployment, link={"rows": "loss"})
    home.joinpath("run.json").write_text(json.dumps(content), encoding="utf-8")
    new(home / "app", home / "run.json", [])
    return home / "app/flexp_app/flexp.json"


def start(file: Path, grid: Grid) -> None:
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    options = {"listen": "127.0.0.1:0", "host": "", "state": str(grid.state / "server")}
    server_app(file)(grid, Context(1, 0, {}, RecordDict(), options))


def test_it_equals_the_simulation_also_when_it_was_stopped(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flwr.supercore.exit.exit_handler import trigger_exit_handlers

    file = written(home, schedule="deterministic", clients=NAMES, save_every=1)
    runner.run(tiny.config(home, train={"rounds": 2, "steps_per_round": 2}, model={"base_depth": 1}), home / "sim")

    def stop_early() -> None:  # as ``flwr stop`` does
        diary, end = home / "clients/west/metrics.jsonl", time.monotonic() + 60
        while time.monotonic() < end and not (diary.exists() and '"kind": "step"' in diary.read_text()):
            time.sleep(0.01)
        trigger_exit_handlers(run_before_force_exit=True)

    stopper = threading.Thread(target=stop_early)
    stopper.start()
    grid = Grid(home, falls=2)
    start(file, grid)
    stopper.join()
    assert "stopping" in (said := capsys.readouterr().out)
    assert "it fell" in said
    assert sorted(grid.started) == [1, 2, 2, 3]
    start(file, Grid(home))
    said = capsys.readouterr().out
    assert "the run is over" in said
    assert all(f"{name:20}over True  steps 4  accuracy" in said for name in NAMES), said
    there, here = tiny.checkpoint(home / "sim"), parties(home, NAMES)
    assert there.keys() == here.keys()
    for party, state in there.items():
        assert equal(without_meters(state), without_meters(here[party])), party


@pytest.mark.timeout(900)
@pytest.mark.parametrize("simulated", [False, True], ids=["deployment", "simulation"])
def test_flower_itself_carries_it(home: Path, simulated: bool) -> None:
    """Flower's own SuperLink, SuperNodes and processes; or its simulation, whose ClientApps run in Ray's actors."""
    if simulated:
        pytest.importorskip("ray", reason="Flower's simulation runs on Ray")
    from examples.flower.demo import Flower, wait_for

    written(home, schedule="deterministic", clients=NAMES)
    runner.run(tiny.config(home, train={"rounds": 2, "steps_per_round": 2}, model={"base_depth": 1}), home / "sim")
    state = home / ("server/clients" if simulated else "clients")
    nodes = [f'partition-id={number} state="{state}"' for number in range(3)]
    with Flower(home / "flower", 3 if simulated else nodes) as flower:
        run = flower.run(home / "app", home / "server")
        wait_for(lambda: bool(flower.apps()), 60)
        wait_for(lambda: not flower.apps(), 600)
        said = flower.flwr("log", run, "here", "--show")
    assert all(f"{name:20}over True  steps 4  accuracy" in said for name in NAMES), said
    there, here = tiny.checkpoint(home / "sim"), parties(home, NAMES, state)
    assert there.keys() == here.keys()
    for party, saved in there.items():
        assert equal(without_meters(saved), without_meters(here[party])), party


class Nobody(Grid):
    """No node has come."""

    def get_node_ids(self) -> list[int]:
        return []


def test_the_server_keeps_to_what_deployment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("flexp.run.server.run_server", lambda *_, **options: given.update(options))
    limits = {"max_tokens": 64, "requests_per_second": 5.0, "bytes_per_second": 1e6}
    file = written(home, clients=NAMES, on_stop="wait", allow_export=True, **limits)
    start(file, Nobody(home))
    assert (given["dismiss"], given["allow_export"]) == (False, True)
    assert {name: getattr(given["limits"], name) for name in limits} == limits
    content = json.loads(file.read_text(encoding="utf-8"))
    for key, value in {"blocks": [1, 2], "next": "grpc://127.0.0.1:1"}.items():
        file.write_text(json.dumps(content | {"deployment": {"clients": NAMES, key: value}}), encoding="utf-8")
        with pytest.raises(ConfigError, match="one server has all shared blocks"):
            start(file, Nobody(home))


@pytest.mark.parametrize(("name", "cut", "codec"), [("west", (3, 4), "int8-row"), ("north", (2, 4), None)])
def test_a_node_with_its_own_data_keeps_what_clients_have(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, cut: Any, codec: Any
) -> None:
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    content, found = tiny.content(home), list[Any]()
    clients = {"cut": [2], "each": [{"name": "west", "cut": [3, 4], "codec": "int8-row"}]}
    content["data"] |= {"source": "none", "clients": clients}

    def runs(setup: Any, _deployment: Any, _reach: Any, state: Path, *, codec: Any, **_: Any) -> bool:
        state.mkdir(parents=True)
        state.joinpath("metrics.jsonl").touch()
        found.extend([setup, codec])
        return True

    monkeypatch.setattr("flexp.run.client.run_client", runs)
    task = {"server": "grpcs://127.0.0.1:1", "token": "", "ca": "", "content": json.dumps(content)}
    sent = Message(RecordDict({"flexp": ConfigRecord(task)}), dst_node_id=1, message_type="train")
    own = {"name": name, "data": str(home / "rows.jsonl"), "state": str(home / "clients")}
    client_app()(sent, Context(1, 1, own, RecordDict(), {}))
    setup, coded = found
    assert (setup.data.name, setup.cut, setup.cut_is_given) == (name, cut, False)
    assert codec is None or coded.activation == codec
    assert setup.run.federation.remarks
    said = capsys.readouterr().out
    assert all(f"flexp: {name}: {line}" in said for line in setup.run.federation.remarks)


def test_a_run_without_names_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"deployment.clients; name the run's clients"):
        written(home)
