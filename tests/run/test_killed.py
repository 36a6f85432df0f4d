"""What is killed comes back as it was, and takes nothing else with it: real processes, forked from one that has all
imported, which this file's tests have in common."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from flexp.comparison.compare import plan
from flexp.comparison.config import load
from flexp.comparison.workers import Pool
from flexp.run import runner
from flexp.run.fleet import Fleet, command
from flexp.run.processes import begin
from flexp.run.settle import settle
from tests.cli.test_commands import toml
from tests.cli.test_compare import TABLE
from tests.tiny import bert_folder, checkpoint, config

from .test_fleet import check, configured, kept_examples, until
from .test_runner import same


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
