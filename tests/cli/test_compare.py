"""``flexp compare`` as a user types it, with real worker processes: stopped, gone on with, called once more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flexp.comparison.compare import plan
from flexp.comparison.config import load
from flexp.comparison.workers import Pool

from ..experiments.tiny import bert_folder
from .test_commands import toml

TABLE = """
[compare]
methods = ["flexp-sfl", "fedavg", "alone"]
seeds = 2
trials = 2
[compare.variants.alone]
method = "local"
"""


def called(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "flexp.cli.main", "compare", str(folder / "run.toml"), "--out", "out", *options]


def alive(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for process in psutil.process_iter(["status", "cmdline"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or []))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute, but for a machine that is busy with other things
def test_stopped_then_gone_on_with_then_nothing_to_do(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + TABLE, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            called(tmp_path, *options), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    listed = call("--dry-run")
    assert listed.returncode == 0
    assert listed.stdout.splitlines()[-1] == "12 runs in out"
    assert not (tmp_path / "out").exists()

    process = subprocess.Popen(
        called(tmp_path),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    finished = tmp_path / "out/cells"
    deadline = time.monotonic() + 900
    while not list(finished.rglob("summary.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers too
    _, said = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "go on with the same command and --out out" in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(process.pid) == []
    kept = len(list(finished.rglob("summary.json")))
    assert 1 <= kept < 12
    assert not (tmp_path / "out/comparison.json").exists()

    done = call()
    assert done.returncode == 0, done.stderr
    assert f"{12 - kept} runs to do, {kept} done before" in done.stdout
    content = json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8"))
    assert [(m["name"], m["method"], len(m["trials"]), len(m["runs"])) for m in content["methods"]] == [
        ("flexp-sfl", "flexp-sfl", 2, 2),
        ("fedavg", "fedavg", 2, 2),
        ("alone", "local", 2, 2),
    ]

    stamps = {place: place.stat().st_mtime_ns for place in finished.rglob("*")}
    for log in (tmp_path / "out").glob("worker-*.log"):
        log.unlink()
    again = call()
    assert again.returncode == 0
    assert "0 runs to do, 12 done before" in again.stdout
    assert {place: place.stat().st_mtime_ns for place in finished.rglob("*")} == stamps
    assert json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8")) == content
    for word in ("flexp-sfl", "fedavg", "alone", "Saved in out"):
        assert word in again.stdout
    assert not list((tmp_path / "out").glob("worker-*.log"))  # no worker was started


@pytest.mark.slow
def test_a_worker_that_dies_takes_only_its_cell_with_it(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path)
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
