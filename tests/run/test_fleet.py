"""A run on several machines has the weights of the simulation, bit for bit, whoever is killed on the way."""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from flexp.config import DeploymentConfig, RunConfig
from flexp.errors import ConfigError, FlexpError
from flexp.export.client_folder import of_client
from flexp.export.heads import audit_head
from flexp.files import read_json
from flexp.links.asking import PIECES
from flexp.links.base import Link
from flexp.links.grpc import connect
from flexp.links.messages import ForwardRequest
from flexp.methods.base import deployed
from flexp.report.metrics import read
from flexp.run import runner
from flexp.run.client import run_client
from flexp.run.fleet import LEFT, Fleet
from flexp.run.gathering import Gathering
from flexp.run.server import make_conductor, make_server
from flexp.run.settle import settle, settle_client
from flexp.run.store import Store
from tests import tiny
from tests.harness import equal
from tests.links.grpc_tools import make_certificates

from .tools import Client, Server, fleet, newest, parties, plain, without_meters

NAMES = list(tiny.CLIENTS)
FIXED = DeploymentConfig(schedule="deterministic", clients=NAMES, save_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("fleet")
    tiny.bert_folder(place / "model", dropout=True)
    return place


def configured(folder: Path, kind: str = "weights", steps: int = 2, **changes: object) -> RunConfig:
    align = {"kind": kind, "weight": 0.5, "pull": 0.3, "every": 2, "teach": kind == "weights"}
    train = {"rounds": 2, "steps_per_round": steps, "batch_size": 4, "micro_batch": 2, "order": "random"}
    return tiny.config(folder, method={"align": align}, train=train, **changes)


def kept_examples(folder: Path, steps: int) -> RunConfig:
    """Frozen heads without dropout, whose examples cross once; three steps an epoch."""
    tiny.bert_folder(folder / "model")
    return tiny.config(
        folder,
        method={"align": {"kind": "off"}, "personal": {"frozen_head_blocks": 1}},
        data={"clients": {"cut": [1, None]}},
        link={"cache": "disk"},
        train={"rounds": 2, "steps_per_round": steps, "batch_size": 4, "micro_batch": 2, "order": "random"},
    )


def check(sim: Path, out: Path) -> None:
    there, here = tiny.checkpoint(sim), parties(out, NAMES)
    assert there.keys() == here.keys()
    for party, state in there.items():
        assert equal(without_meters(state), without_meters(here[party])), party


@pytest.mark.parametrize("when", ["starting", "running"])
def test_a_fleet_that_is_stopped_takes_its_parties_along(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """SIGTERM is what systemd, docker and timeout send; it left server and clients behind."""
    made = Fleet(settle(tiny.config(folder)), tmp_path / "out")
    stopped: list[bool] = []

    def killed() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return True

    monkeypatch.setattr(made, "start", killed if when == "starting" else lambda: None)
    monkeypatch.setattr(made, "watch", killed)
    monkeypatch.setattr(made, "stop", lambda: stopped.append(True))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert stopped == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_server_that_somebody_stops_is_no_end(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what an earlier, shorter run has left."""
    made = Fleet(settle(configured(folder)), tmp_path / "out", say=lambda line: None)
    store, made.server.ended = Store(tmp_path / "out/server"), True
    for name in ("start", "stop"):
        monkeypatch.setattr(Fleet, name, lambda self: None)
    for number, over, planned in ((1, False, 4), (2, True, 3)):
        store.save(number, {"server": {"x": torch.zeros(1)}}, {"over": over, "planned": planned})
        with pytest.raises(FlexpError, match=r"before the run was over, after 0 of 12 steps; to go on: flexp fleet wi"):
            made.run()
    store.save(3, {"server": {"x": torch.zeros(1)}}, {"over": True, "planned": 4})
    for client in made.clients.values():  # who never joined is not waited for before, and is now
        client.ended = True
    made.run()


def test_a_client_that_leaves_is_started_again_unless_its_server_stops(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    made = Fleet(settle(configured(folder)), tmp_path / "out", restarts=2, say=said.append)
    monkeypatch.setattr(
        Fleet, "start_client", lambda self, name: setattr(self.clients[name], "starts", 1 + north.starts)
    )
    north = made.clients["north"]
    north.starts, north.process = 1, SimpleNamespace(exitcode=LEFT)  # type: ignore[assignment]
    for party, words in ((made.server, "flexp server: serving"), (north, "go on with the same command")):
        party.log.parent.mkdir(parents=True)
        party.log.write_text(f"flexp server: stopping\n{words}\n", encoding="utf-8")
    made.server.said = len("flexp server: stopping\n")  # that was before it was started again
    assert not made.watch()
    assert not made.watch()
    assert said == ["north left before the run was over; starting it again"] * 2
    with pytest.raises(
        FlexpError, match=r"north ended 3 times before the run was over: go on .*; to go on: flexp fleet with --out"
    ):
        made.watch()
    made.server.log.write_text("flexp server: serving\nflexp server: stopping\n", encoding="utf-8")
    made.server.said, north.starts = 0, 1
    assert not made.watch()
    assert north.starts == 1
    assert not north.ended


@pytest.mark.parametrize("how", ["plain", "mutual TLS"])
def test_a_fleet_equals_the_simulation(folder: Path, tmp_path: Path, how: str) -> None:
    if how == "plain":
        config = configured(folder, "weights", server={"update": "mean", "mean_over": 2})
    else:
        lora = {"id": str(folder / "model"), "tuning": "lora"}
        config = configured(folder, "kl", server={"adapters": "own"}, model=lora)
    runner.run(config, tmp_path / "sim")
    if how == "plain":
        fleet(config, FIXED, tmp_path / "fleet")
    else:
        made = make_certificates(tmp_path)

        def reach(server: Server) -> Callable[[str], Link]:
            def link(name: str) -> Link:
                url = f"grpcs://{server.address}"
                return connect(url, name, ca=made.ca, certificate=made.client[0], key=made.client[1])

            return link

        fleet(config, FIXED, tmp_path / "fleet", reach, tls=made.tls(mutual=True))
    check(tmp_path / "sim", tmp_path / "fleet")
    scores = [r["personal"] for r in read(tmp_path / "fleet/clients/north/metrics.jsonl") if r["kind"] == "eval"]
    told = read(tmp_path / "sim/metrics.jsonl")
    assert scores == [r["personal"] for r in told if r["kind"] == "eval" and r["client"] == "north"]


def test_a_deployed_client_says_what_its_server_can_read(folder: Path, tmp_path: Path) -> None:
    """As the simulation does, of which each client here has a depth of its own; and nothing else changes."""
    public = folder / "public.txt"
    public.write_text("good bad fine poor and many other words that people use\n" * 4, encoding="utf-8")
    config = configured(folder, "off", privacy={"audit": True, "public": str(public)})
    runner.run(config, tmp_path / "sim")
    fleet(config, FIXED, tmp_path / "fleet")
    check(tmp_path / "sim", tmp_path / "fleet")

    def read_by(found: Path) -> dict[tuple[str, int], float]:
        told = read_json(found / "audit.json")
        assert told["steps"] == config.train.steps_per_round
        return {(one["attack"], one["depth"]): one["content"] for one in told["readings"]}

    together: dict[tuple[str, int], float] = {}
    for name in NAMES:
        together |= read_by(tmp_path / "fleet/clients" / name)
    assert together == read_by(tmp_path / "sim")
    assert len(together) == 2 * len(NAMES)


def test_stopped_and_started_again_equals_undisturbed(folder: Path, tmp_path: Path) -> None:
    """A client stops after its step, then all of them and the server; each goes on from what it saved."""
    config = configured(folder, steps=3)
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"

    def start(server: Server) -> dict[str, Client]:
        return {name: Client(config, FIXED, name, plain(server), out / "clients" / name) for name in NAMES}

    first = Server(config, FIXED, out / "server")
    clients = start(first)
    until(lambda: first.server.shared.version >= 3)
    clients["south"].stop.set()
    clients["south"].join()
    assert clients["south"].over is False
    clients["south"] = Client(config, FIXED, "south", plain(first), out / "clients" / "south")
    until(lambda: first.server.shared.version >= 8)
    for client in clients.values():
        client.stop.set()
    for client in clients.values():
        client.join()
    first.end()
    assert first.server.shared.version < 18

    second = Server(config, FIXED, out / "server")
    for client in start(second).values():
        client.join()
        assert client.over
    second.end()
    assert any("back to snapshot" in line for line in second.lines)
    check(tmp_path / "sim", out)


def test_stops_between_two_snapshots_lose_none(folder: Path, tmp_path: Path) -> None:
    """What a client saves where it is stopped does not push out what all have."""
    config = configured(folder, steps=4)
    rare = DeploymentConfig(schedule="deterministic", clients=NAMES, save_every=100, keep=1)
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"
    for last in (False, False, False, True):
        server = Server(config, rare, out / "server")
        clients = [Client(config, rare, name, plain(server), out / "clients" / name) for name in NAMES]
        if not last:
            until(lambda: server.server.updates >= 4)  # noqa: B023
            for client in clients:
                client.stop.set()
        for client in clients:
            client.join()
            assert client.over is last
        server.end()
    check(tmp_path / "sim", out)


@pytest.mark.parametrize(("schedule", "link"), [("free", "in process"), ("deterministic", "grpc")])
def test_a_server_that_stops_sends_its_clients_home(folder: Path, tmp_path: Path, schedule: str, link: str) -> None:
    """In the middle of a step; a second run ends with the weights of an undisturbed one."""
    config = configured(folder, "kl")
    asked = DeploymentConfig.model_validate({"schedule": schedule, "clients": ["south"], "save_every": 2})

    def session(out: Path, stop_at: int = 0) -> tuple[bool, list[str]]:
        server = Server(config, asked, out / "server") if link == "grpc" else InProcess(config, asked, out / "server")
        service, answer, forwards = server.server, server.server.answer, 0

        def counting(client: str, request: Any) -> Any:
            nonlocal forwards
            forwards += isinstance(request, ForwardRequest) and request.train
            if forwards == stop_at and stop_at and not service.stops:
                server.stop.set() if link == "grpc" else service.dismiss()
                until(lambda: link == "in process" or "stopping" in server.lines)
            return answer(client, request)

        service.answer = counting  # type: ignore[method-assign]
        reach = plain(server) if isinstance(server, Server) else service.connect
        console = Console(file=io.StringIO(), width=200)
        setup = settle_client(config, "south", None)
        over = run_client(setup, asked, lambda: reach("south"), out / "south", console=console, stop=threading.Event(),
                          codec=config.link.codec)  # fmt: skip
        server.end()
        return over, console.file.getvalue().splitlines()  # type: ignore[attr-defined]

    assert session(tmp_path / "whole")[0]
    over, lines = session(tmp_path / "two", stop_at=6)  # the second of two micro-batches of step 3
    assert not over
    assert any("south: the server stops; save, leave" in line for line in lines), lines
    assert any("south: stopped after 2 steps" in line for line in lines), lines
    assert session(tmp_path / "two")[0]
    for party in ("server", "south/snapshots"):
        one, two = (without_meters(newest(tmp_path / way / party)) for way in ("whole", "two"))
        assert equal(one, two), party


class InProcess:
    """A server and its conductor, without a network."""

    def __init__(self, config: RunConfig, deployment: DeploymentConfig, state: Path) -> None:
        start, end = settle(config).cuts["south"]
        self.server = make_server(config, min(start, 1), end, "sequence-classification", ["south"])
        self.server.conductor = make_conductor(self.server, config, deployment, state, lambda _: None)

    def end(self) -> None:
        self.server.conductor.close()  # type: ignore[union-attr]


def test_the_server_comes_back_while_its_clients_live(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, "kl", steps=3)
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"
    stays = FIXED.model_copy(update={"on_stop": "wait"})
    first = Server(config, stays, out / "server")
    clients = [Client(config, FIXED, name, plain(first), out / "clients" / name) for name in NAMES]
    until(lambda: first.server.shared.version >= 7)
    first.end()
    second = Server(config, FIXED, out / "server", first.address)
    for client in clients:
        client.join()
    second.end()
    check(tmp_path / "sim", out)


def test_nobody_waits_in_a_free_run(folder: Path, tmp_path: Path) -> None:
    """One client comes late and goes back to a snapshot; nothing is applied twice, and all do all their steps."""
    config = configured(folder, steps=4)
    free = DeploymentConfig(schedule="free", clients=NAMES, save_every=2)
    out = tmp_path / "fleet"
    server = Server(config, free, out / "server")
    early = [Client(config, free, name, plain(server), out / "clients" / name) for name in NAMES[:2]]
    until(lambda: server.server.shared.version >= 5)
    early[0].stop.set()
    early[0].join()
    again = Client(config, free, NAMES[0], plain(server), out / "clients" / NAMES[0])
    late = Client(config, free, NAMES[2], plain(server), out / "clients" / NAMES[2])
    for client in (again, early[1], late):
        client.join()
        assert client.over
    server.end()
    assert server.server.shared.version == 3 * 8
    assert {name: server.server.clients[name].progress.newest for name in NAMES} == dict.fromkeys(NAMES, 8)
    for name in NAMES:
        steps = [r["step"] for r in read(out / "clients" / name / "metrics.jsonl") if r["kind"] == "step"]
        assert sorted(steps) == list(range(1, 9))


def test_a_cut_changes_between_sessions(folder: Path, tmp_path: Path) -> None:
    """What a client keeps is as it was, what is new to it is the server's; the others do not notice."""
    config = configured(folder, steps=4)
    free = DeploymentConfig(schedule="free", clients=NAMES, save_every=2)
    out = tmp_path / "fleet"
    server = Server(config, free, out / "server")
    clients = {name: Client(config, free, name, plain(server), out / "clients" / name) for name in NAMES}
    until(lambda: server.server.shared.version >= 6)
    clients["south"].stop.set()
    clients["south"].join()
    before = newest(out / "clients/south/snapshots")
    stopped = int(before["steps"])
    assert stopped < 8
    again = Client(config, free, "south", plain(server), out / "clients/south", cut=(3, None))
    for client in (again, clients["north"], clients["west"]):
        client.join()
        assert client.over
    server.end()
    after = newest(out / "clients/south/snapshots")
    assert int(after["steps"]) == 8
    names = {key for key in after if key.startswith("personal/")}
    assert {key for key in before if key.startswith("personal/")} < names
    assert {key.split(".layer.")[1][0] for key in names if ".layer." in key} == {"0", "1", "2"}
    assert server.server.shared.version == 3 * 8
    with pytest.raises(ConfigError, match="in a free run only"):
        Client(config, FIXED, "south", plain(server), out / "clients/south", cut=(1, 4)).join()


def test_a_cut_changes_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    """A snapshot of step 0, to which the server sends whoever comes back without steps, does not undo it."""
    config = configured(folder)
    free = DeploymentConfig(schedule="free", clients=["south"], save_every=2)
    state, stopped = tmp_path / "south", threading.Event()
    stopped.set()
    server = Server(config, free, None)
    where = settle_client(config, "south", None)
    run_client(where, free, lambda: plain(server)("south"), state, console=Console(quiet=True), stop=stopped)
    snapshots = Store(state / "snapshots")
    facts = snapshots.open(0).facts
    assert (facts["steps"], tuple(facts["cut"])) == (0, where.cut) != (0, (3, 4))
    saved = snapshots.load(0)
    snapshots.save(0, saved, facts | {"run": server.conductor.run})  # as if the server had told it to save
    Client(config, free, "south", plain(server), state, cut=(3, None)).join()
    server.end()
    assert tuple(newest(state / "snapshots")["cut"].tolist()) == (3, 4)


def until(there: Callable[[], bool], seconds: float = 60.0, pause: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(pause)


def test_a_fleet_that_meets_equals_the_simulation(folder: Path, tmp_path: Path) -> None:
    """One client vanishes after its first steps, with what it had met, and comes back; sums are masked, with keys that
    the clients agree on through the server."""
    model = {"id": str(folder / "model"), "pooling": "mean"}
    config = tiny.config(
        folder,
        model=model,
        method={"align": {"kind": "off"}, "meet": {"on": True}},
        train={"rounds": 2, "steps_per_round": 3, "batch_size": 4},
    )
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"
    server = Server(config, FIXED, out / "server")
    clients = [Client(config, FIXED, name, plain(server), out / "clients" / name) for name in NAMES]
    until(lambda: server.server.shared.version >= 4)
    clients[0].stop.set()
    clients[0].join()
    clients[0] = Client(config, FIXED, NAMES[0], plain(server), out / "clients" / NAMES[0])
    for client in clients:
        client.join()
    server.end()
    assert not any("class sums go to the server as they are" in line for line in server.lines)
    check(tmp_path / "sim", out)
    with pytest.raises(ConfigError, match=r"need deployment\.clients"):
        make_conductor(server.server, config, DeploymentConfig(schedule="free"), None, print)


@pytest.mark.parametrize("how", ["fedavg deterministic", "fedavg free", "split-fedavg deterministic"])
def test_a_fleet_that_averages_equals_the_simulation(folder: Path, tmp_path: Path, how: str) -> None:
    """Sums are masked. In a deterministic run one client is killed, and is back with less than it had; then all are
    stopped, and go on."""
    method, _, schedule = how.partition(" ")
    meet = {"on": how == "fedavg deterministic"}
    config = tiny.config(
        folder,
        model={"id": str(folder / "model"), "pooling": "mean"},
        method={"name": method, "meet": meet},
        train={"rounds": 3, "steps_per_round": 2, "batch_size": 4, "micro_batch": 2, "order": "random"},
    )
    runner.run(config, tmp_path / "sim")
    out, saves = tmp_path / "fleet", DeploymentConfig(schedule=schedule, clients=NAMES, save_every=3)  # type: ignore[arg-type]

    def start(name: str, server: Server) -> Client:
        return Client(config, saves, name, plain(server), out / "clients" / name)

    server = Server(config, saves, out / "server")
    clients = {name: start(name, server) for name in NAMES}
    if schedule == "deterministic":
        until(lambda: PIECES in server.server.sums.done)
        clients["south"].stop.set()
        clients["south"].join()
        store = Store(out / "clients/south/snapshots")
        for number in store.numbers()[1:]:
            store.quarantine(number)
        clients["south"] = start("south", server)
        until(lambda: 2 * PIECES in server.server.sums.done)
        for client in clients.values():
            client.stop.set()
        for client in clients.values():
            client.join()
        server.end()
        server = Server(config, saves, out / "server")
        clients = {name: start(name, server) for name in NAMES}
    for client in clients.values():
        client.join()
        assert client.over
    server.end()
    there, here = tiny.checkpoint(tmp_path / "sim"), parties(out, NAMES)
    for name in NAMES:
        own = of("personal/", here[f"client-{name}"])
        if method == "fedavg":
            met = of("kept/met/", there[f"client-{name}"])
            assert bool(met) is meet["on"]
            assert equal(own, {**of("global/", there["server"]), **met})
            exported = of_client(out / "clients" / name, None, "last", None)  # needs no server
            assert equal(exported.split.personal_state(), own)
            with pytest.raises(ConfigError, match=r"sends no activations \(clients of 'fedavg' .* needs a split model"):
                audit_head(out / "clients" / name)
        else:
            assert equal(own, of("personal/", there[f"client-{name}"]))
        with pytest.raises(ConfigError, match="needs a split model"):
            audit_head(tmp_path / "sim", name)
    assert (server.server.blocks == (4, 4)) is (method == "fedavg")


@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("seconds", [None, 3.0])
def test_who_is_behind_the_others_when_all_were_killed_has_their_averages(
    folder: Path, tmp_path: Path, seconds: float | None, over: bool
) -> None:
    """In a free run: a power cut has taken one client's last snapshots, and the server's (or it knows that the run is
    over). The client does its rounds again, and takes the averages that the others went on from, bit for bit."""
    config = tiny.config(folder, method={"name": "fedavg"}, train={"rounds": 3, "steps_per_round": 2, "batch_size": 4})
    runner.run(config, tmp_path / "sim")
    out = tmp_path / "fleet"
    free = DeploymentConfig(schedule="free", clients=NAMES, save_every=2, keep=9, meeting_seconds=seconds)
    fleet(config, free, out)
    behind, server = Store(out / "clients/north/snapshots"), Store(out / "server", None)
    for number in behind.numbers():
        if behind.open(number).facts["met"] > 1:
            behind.quarantine(number)
    assert behind.numbers()
    for number in server.numbers():
        if server.open(number).facts["over"] and not over:
            server.quarantine(number)
    fleet(config, free, out)
    wanted = of("global/", tiny.checkpoint(tmp_path / "sim")["server"])
    for name in NAMES:
        assert equal(of("personal/", newest(out / "clients" / name / "snapshots")), wanted)


def the_last_one_late(config: RunConfig, folder: Path) -> tuple[Server, Path]:
    """A free run whose last client comes when the others have gone; and where clients' folders are."""
    here = DeploymentConfig(clients=NAMES, meeting_seconds=0.5)
    server, out = Server(config, here, folder / "server"), folder / "clients"
    for names in (NAMES[:2], NAMES[2:]):
        clients = [Client(config, here, name, plain(server), out / name) for name in names]
        for client in clients:
            client.join()
            assert client.over
    server.end()
    return server, out


def test_who_is_left_out_of_an_average_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, list[str]] = {name: [] for name in NAMES}
    say = Gathering._say_who

    def kept(self: Any, *args: Any) -> None:
        self._note = said[self.data.name].append
        say(self, *args)

    monkeypatch.setattr(Gathering, "_say_who", kept)
    (tmp_path / "secret").write_text("0123456789abcdef0123456789abcdef", encoding="utf-8")
    method = {"name": "fedavg", "meet": {"secret": str(tmp_path / "secret")}}
    config = tiny.config(folder, method=method, train={"rounds": 2, "steps_per_round": 1, "batch_size": 4})
    the_last_one_late(config, tmp_path)
    first, second, late = NAMES
    both = ", ".join(sorted((first, second)))
    for name in (first, second):
        assert said[name] == [f"from round 1 on weights are averaged of {both}"]
    assert said[late] == [
        f"{late} came too late for the average of round {number}: it takes that of {both}, and keeps its own weights "
        "where they gave none"
        for number in (1, 2)
    ]


def of(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def test_what_no_network_runs_is_refused(folder: Path, tmp_path: Path) -> None:
    config = tiny.config(folder, method={"name": "ditto"})
    with pytest.raises(
        ConfigError, match=r"'ditto' is for simulations .*; on a network there are .*fedavg, flexp-sfl, s"
    ):
        Fleet(settle(config), tmp_path / "out")
    stopping = {"train": {"early_stopping": {"patience": 2}}, "data": {"validation_fraction": 0.2}}
    config = tiny.config(folder, method={"name": "fedavg"}, **stopping)
    with pytest.raises(ConfigError, match="early_stopping: clients of 'fedavg' are averaged until the last round"):
        Server(config, DeploymentConfig(clients=NAMES), None)


@pytest.mark.parametrize(
    ("method", "table", "key"),
    [
        ("fedavg", {"model": {"base_depth": 1}}, "model.base_depth"),
        ("fedavg", {"server": {"adapters": "own"}}, "server.adapters"),
        ("fedavg", {"server": {"guard": {"clip": 1.0}}}, "server.guard.clip"),
        ("fedavg", {"link": {"codec": {"gradient": "bf16"}}}, "link.codec.gradient"),
        ("fedavg", {"privacy": {"audit": True}}, "privacy.audit"),
    ],
)
def test_what_means_nothing_to_a_method_is_refused_by_every_party(
    folder: Path, tmp_path: Path, method: str, table: dict[str, Any], key: str
) -> None:
    """A simulation, whose configuration may be for several methods, takes it; so do other methods. Nor does a fleet say
    any of it to its server."""
    table = {"model": {"id": str(folder / "model")}} | table
    table["model"] = {"id": str(folder / "model")} | table["model"]
    config = tiny.config(folder, method={"name": method}, **table)
    settled = settle(config)
    starts: list[Callable[[], Any]] = [
        lambda: Fleet(settled, tmp_path / "out"),
        lambda: Server(config, DeploymentConfig(clients=NAMES), None),
        lambda: settle_client(config, "north", None),
    ]
    for start in starts:
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} means nothing to clients of {method!r} on a network"):
            start()
    plainly = tiny.config(folder, method={"name": method}, model={"id": str(folder / "model")})
    assert Fleet(settle(plainly), tmp_path / "out").blocks == []
    assert deployed(tiny.config(folder, method={"name": "split-fedavg"}, **table)).averages
    assert deployed(tiny.config(folder, method={"name": "flexp-sfl"}, **table)).middle


def test_in_a_free_run_those_meet_that_are_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef0123456789abcdef", encoding="utf-8")
    meet = {"on": True, "secret": str(tmp_path / "secret")}
    config = tiny.config(
        folder,
        model={"id": str(folder / "model"), "pooling": "mean"},
        method={"align": {"kind": "off"}, "meet": meet},
        train={"rounds": 1, "steps_per_round": 2, "batch_size": 4},
    )
    server, out = the_last_one_late(config, tmp_path)
    sums = server.server.sums.done
    assert sorted(sums) == list(range(6))
    assert all(set(reply.notes) == set(NAMES[:2]) for reply in sums.values())
    for name in NAMES:
        snapshots = Store(out / name / "snapshots")
        assert snapshots.open(max(snapshots.numbers())).facts["met"] == 2
