"""A run over three servers and three clients, over gRPC, has the simulation's weights, whoever falls."""

from __future__ import annotations

import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from flexp.config import DeploymentConfig, RunConfig
from flexp.errors import ConfigError, LinkError, StorageError
from flexp.links.base import Link
from flexp.links.grpc import connect
from flexp.links.grpc.link import GrpcLink
from flexp.run import chaining, runner
from flexp.run import party as parties
from flexp.run.chaining import follows, take_place
from flexp.run.conduct import Conductor
from flexp.run.server import make_conductor, make_server, rise
from flexp.server import Server
from tests import tiny
from tests.links.grpc_tools import vanish

from .tools import Client, newest, without_meters

NAMES = list(tiny.CLIENTS)


class Member:
    """One server of a chain, in a thread, as ``flexp server`` runs it."""

    def __init__(self, config: RunConfig, deployment: DeploymentConfig, state: Path, listen: str) -> None:
        self.lines: list[str] = []
        self.stop = threading.Event()
        led, next_server = follows(deployment, 1), deployment.next

        def begin() -> tuple[Server, Conductor | None]:
            kind = "sequence-classification"
            made = make_server(config, 1, 4, kind, deployment.clients, deployment=deployment, remembers=not led)  # type: ignore[arg-type]
            reach = None if next_server is None else lambda name: connect(next_server, name, codec="off")
            take_place(made, config, deployment, state, reach, self.lines.append, self.stop)
            return made, None if led else make_conductor(made, config, deployment, state, self.lines.append)

        self.thread = threading.Thread(
            target=lambda: rise(begin, listen, say=self.lines.append, stop=self.stop, dismiss=False)
        )
        self.thread.start()

    @property
    def address(self) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for line in self.lines:
                if line.startswith("serving"):
                    return line.split(" at ")[1]
            time.sleep(0.02)
        raise AssertionError(self.lines)

    def end(self) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def snapshots(folder: Path) -> int:
    return max((int(place.name[-8:]) for place in folder.glob("checkpoint-*")), default=-1)


def test_three_servers_over_grpc_one_of_which_falls_equal_the_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (chaining, parties):
        monkeypatch.setattr(module, "patiently", partial(parties.patiently, most=0.2))
    tiny.bert_folder(tmp_path / "model", dropout=True)
    train = {"rounds": 2, "steps_per_round": 2, "batch_size": 4, "micro_batch": 2, "shared": {"clip": 0.05}}
    config = tiny.config(tmp_path, train=train, method={"align": {"at": "every-block", "teach": True}})
    runner.run(config, tmp_path / "sim")

    whole = {"schedule": "deterministic", "clients": NAMES, "save_every": 1}
    last = DeploymentConfig(blocks=(3, 4), **whole)  # type: ignore[arg-type]
    tail = Member(config, last, tmp_path / "tail", "127.0.0.1:0")
    between = DeploymentConfig(blocks=(2, 3), next=f"grpc://{tail.address}", **whole)  # type: ignore[arg-type]
    middle = Member(config, between, tmp_path / "middle", "127.0.0.1:0")
    first = DeploymentConfig(blocks=(1, 2), next=f"grpc://{middle.address}", **whole)  # type: ignore[arg-type]
    head = Member(config, first, tmp_path / "head", "127.0.0.1:0")
    address, links = head.address, list[GrpcLink]()

    def reach(name: str) -> Link:
        links.append(connect(f"grpc://{address}", name))
        return links[-1]

    clients = [Client(config, first, name, reach, tmp_path / "clients" / name) for name in NAMES]
    while snapshots(tmp_path / "middle") < 4:
        time.sleep(0.02)
    vanish(links[-1])  # as when its process is killed
    middle.end()
    middle = Member(config, between, tmp_path / "middle", middle.address)
    for client in clients:
        client.join()
    for member in (head, middle, tail):
        member.thread.join(60)  # each ends by itself when the run is over
        assert not member.thread.is_alive(), member.lines
    for member in (head, tail):
        assert any("beginning anew" in line for line in member.lines)
    for member in (middle, tail):
        assert any("back to snapshot" in line for line in member.lines)
        gone = [sum(line == f"{name}: gone" for line in member.lines) for name in NAMES]
        joined = [sum(line.startswith(f"{name}: joined") for line in member.lines) for name in NAMES]
        assert gone == joined  # who has left the first has left the others

    there = tiny.checkpoint(tmp_path / "sim")
    here = {f"client-{name}": newest(tmp_path / "clients" / name / "snapshots") for name in NAMES}
    here["server"] = {**newest(tmp_path / "tail"), **newest(tmp_path / "middle"), **newest(tmp_path / "head")}
    for party, state in there.items():
        left, right = without_meters(state), without_meters(here[party])
        assert left.keys() == right.keys()
        assert [name for name, value in left.items() if not torch.equal(value, right[name])] == [], party


def test_a_first_server_that_falls_before_its_own_snapshot_is_back_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers further on have saved already; without an operator all go on from the newest that all have."""
    tiny.bert_folder(tmp_path / "model")
    config = tiny.config(tmp_path)

    def risen() -> Conductor:
        reach, made = None, None
        for name, blocks, url in (
            ("tail", (3, 4), None),
            ("middle", (2, 3), "grpc://x:1"),
            ("head", (1, 2), "grpc://x:1"),
        ):
            deployment = DeploymentConfig(schedule="deterministic", clients=NAMES, keep=1, blocks=blocks, next=url)
            made = make_server(config, 1, 4, "sequence-classification", NAMES, deployment=deployment)
            take_place(made, config, deployment, tmp_path / name, reach, lines.append)
            reach = made.connect
        assert made is not None
        return make_conductor(made, config, deployment, tmp_path / "head", lines.append)

    def fall(conductor: Conductor, number: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(conductor.snapshots, "save", lambda *_: (_ for _ in ()).throw(StorageError("killed")))
            conductor.save(number)

    lines: list[str] = []
    began = risen()
    fall(began, 2)
    assert [snapshots(tmp_path / name) for name in ("head", "middle", "tail")] == [-1, 2, 2]
    again = risen()
    assert (again.run, again.numbers) == (began.run, [])
    again.save(2)
    fall(again, 3)
    fall(again, 4)  # others keep what it has, however often it cannot save
    last = risen()
    assert (last.run, last.numbers) == (began.run, [2])
    last.restore(2)
    shutil.rmtree(tmp_path / "head")
    with pytest.raises(LinkError, match=f"state is of the run {began.run}, the server before goes on with "):
        risen()


def test_blocks_that_nobody_has_are_refused(tmp_path: Path) -> None:
    tiny.bert_folder(tmp_path / "model")
    config = tiny.config(tmp_path)
    for blocks, next_server, why in (
        ((1, 3), None, r"blocks are \[1, 3\), and nobody has those behind them: name .* --next"),
        ((2, 4), "grpc://localhost:1", r"blocks are \[2, 4\), the last: leave out --next"),
        ((2, 5), None, r"--blocks 2:5 \(deployment.blocks\) are no blocks of the shared ones, which are \[1, 4\)"),
    ):
        with pytest.raises(ConfigError, match=why):
            make_server(
                config, 1, 4, "sequence-classification", None,
                deployment=DeploymentConfig(blocks=blocks, next=next_server),
            )  # fmt: skip
