"""What is killed comes back as it was, and takes nothing else with it: real processes, forked from one that has all
imported, which this file's tests have in common."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from flexp.comparison.compare import plan
from flexp.comparison.config import load
from flexp.comparison.workers import Pool
from flexp.run import runner
from flexp.run.fleet import LEFT, Fleet, Process, command
from flexp.run.processes import begin
from flexp.run.settle import settle
from tests.cli.test_commands import toml
from tests.cli.test_compare import TABLE
from tests.harness import equal
from tests.tiny import bert_folder, checkpoint, config

from .test_fleet import check, configured, kept_examples, until
from .test_runner import same
from .tools import newest, without_meters


def test_killed_at_any_moment_resumes_to_equal_weights(home: Path) -> None:
    run = config(home, train={"rounds": 4})
    runner.run(run, home / "undisturbed")
    process = begin(runner.run, run, home / "killed", log=home / "log.txt", threads=1)
    deadline = time.monotonic() + 120
    while not list((home / "killed/checkpoints").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert checkpoint(home / "killed")
    with (home / "killed/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "rou')  # as a kill in the middle of a line leaves it
    assert runner.resume(home / "killed")["finished"]
    same(home / "undisturbed", home / "killed")


@pytest.mark.parametrize("cached", [pytest.param(False, marks=pytest.mark.slow), True])
def test_processes_that_are_killed(home: Path, tmp_path: Path, cached: bool) -> None:
    """Real processes, SIGKILL for a client and for the server in the middle of training; ``cached``: whose server keeps
    examples, and loses them with its process and with each connection."""
    settings = kept_examples(tmp_path, steps=4) if cached else configured(home, steps=7)
    runner.run(settings, tmp_path / "sim")
    made = Fleet(settle(settings), tmp_path / "fleet", schedule="deterministic", save_every=3, say=lambda _: None)
    made.start()
    try:
        for party, steps in ((made.clients["west"], 6), (made.server, 11 if cached else 16)):
            until(lambda steps=steps: sum(row["steps"] for row in made.results()) >= steps or made.watch(), 120, 0.05)
            assert party.process is not None
            party.process.kill()
            party.process.join()
        until(made.watch, 120, 0.05)
    finally:
        made.stop(5)
    assert made.clients["west"].starts == made.server.starts == 2
    check(tmp_path / "sim", tmp_path / "fleet")


def test_a_client_that_somebody_stops_is_started_again(home: Path, tmp_path: Path) -> None:
    """SIGTERM, after which it saves and ends with no error; the others would wait for it for ever."""
    said: list[str] = []
    settings = config(home, train={"rounds": 2, "steps_per_round": 6, "batch_size": 2})
    made = Fleet(settle(settings), tmp_path / "fleet", say=said.append)
    made.start()
    try:
        until(lambda: sum(row["steps"] for row in made.results()) >= 6 or made.watch(), 120, 0.05)
        party = made.clients["west"]
        assert party.process is not None
        party.process.terminate()
        party.process.join()
        assert party.code == LEFT
        until(made.watch, 120, 0.05)
    finally:
        made.stop(5)
    assert said == ["west left before the run was over; starting it again"]
    assert [row["steps"] for row in made.results()] == [12] * 3


def chained(made: Fleet, borders: list[int]) -> list[Process]:
    """The fleet's server as several, each with the blocks between two borders: started, the last one first."""
    servers, following = list[Process](), list[str]()
    for start, stop in reversed([*itertools.pairwise(borders)]):
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = f"127.0.0.1:{free.getsockname()[1]}"
        place = made.out / f"blocks-{start}"
        own = ["--blocks", f"{start}:{stop}", "--state", str(place), "--listen", listen, *following]
        config = ["--config", str(made.out / "fleet.json"), "--base-depth", str(borders[0])]
        servers.append(Process(place.name, ["server", *config, *own], place / "log.txt"))
        servers[-1].start(1)
        following, made.address = ["--next", f"grpc://{listen}"], listen
    made.server = servers[-1]
    return servers


@pytest.mark.parametrize(
    ("borders", "align"),
    [
        pytest.param(
            [1, 3, 4], {"kind": "weights", "pull": 0.3, "teach": True, "follow": True}, marks=pytest.mark.slow
        ),
        ([1, 2, 3, 4], {"kind": "kl", "at": "every-block", "teach": True}),
    ],
)
def test_each_server_of_a_chain_is_killed(
    home: Path, tmp_path: Path, borders: list[int], align: dict[str, object]
) -> None:
    """And a client. What they end with is one server's, as the simulation has it."""
    train = {"rounds": 2, "steps_per_round": 4, "batch_size": 4, "micro_batch": 2, "shared": {"clip": 0.05}}
    settings = config(home, train=train, method={"align": align})
    runner.run(settings, tmp_path / "sim")
    made = Fleet(settle(settings), tmp_path / "chain", schedule="deterministic", save_every=2, say=lambda _: None)
    servers = chained(made, borders)
    try:
        for name in made.clients:
            made.start_client(name)
        for killed, party in enumerate([made.clients["west"], *servers], start=1):
            steps = 20 * killed // (len(servers) + 1)
            until(lambda steps=steps: sum(row["steps"] for row in made.results()) >= steps or made.watch(), 120, 0.05)
            assert party.process is not None
            party.process.kill()
            party.process.join()
            party.start(1)
        until(lambda: made.watch() and {party.code for party in servers} == {0}, 120, 0.05)
    finally:
        for party in servers:
            assert party.process is not None
            party.process.kill()
        made.stop(5)
    assert [party.starts for party in (made.clients["west"], *servers)] == [2] * (len(servers) + 1)
    here = {f"client-{name}": newest(made.folder(name) / "snapshots") for name in made.clients}
    here["server"] = {key: value for party in servers for key, value in newest(party.log.parent).items()}
    for name, state in checkpoint(tmp_path / "sim").items():
        assert equal(without_meters(state), without_meters(here[name])), name


def test_a_worker_that_dies_takes_only_its_cell_with_it(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path, train={"rounds": 1, "steps_per_round": 1})
    wanted = load(path, [], {"methods": ["local", "fedavg"], "seeds": 1, "tune": False})
    first, second = (track.final[0] for track in plan(wanted))
    out = tmp_path / "out"
    out.mkdir()
    with Pool(1, out) as pool:
        assert (pool.free, pool.busy) == (1, False)
        pool.give(first)
        assert (pool.free, pool.busy) == (0, True)
        pool.workers[0].process.kill()
        assert list(pool.take()) == [(first, "its process ended with -9; is there enough memory?")]
        pool.give(second)
        assert list(pool.take()) == [(second, None)]
        config = json.loads((out / second.folder / "config.json").read_text(encoding="utf-8"))
        assert config["threads"] == (os.cpu_count() or 1)
    assert not (out / first.folder / "summary.json").exists()
    assert json.loads((out / second.folder / "summary.json").read_text(encoding="utf-8"))["finished"]


@pytest.mark.slow
def test_workers_end_with_a_comparison_that_is_killed(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + TABLE, encoding="utf-8")
    longer = ("--out", str(tmp_path / "out"), "--jobs", "2", "--no-tune", "--set", "train.rounds=5000")
    process = begin(command, ["compare", str(path), *longer], log=tmp_path / "log.txt", threads=1, alone=True)
    assert process.pid
    forked_by = psutil.Process(process.pid).parent()  # above the comparison, and all that it begins
    assert forked_by
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("out/cells/*/*/metrics.jsonl"))) < 2:  # both have begun
        assert process.is_alive(), (tmp_path / "log.txt").read_text(encoding="utf-8")
        assert time.monotonic() < end
        time.sleep(0.1)
    assert len(forked_by.children(recursive=True)) >= 3
    process.kill()
    process.join()
    while forked_by.children(recursive=True):
        assert time.monotonic() < end
        time.sleep(0.1)
