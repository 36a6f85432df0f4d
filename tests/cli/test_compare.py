"""``flexp compare`` as a user types it, with real worker processes: stopped, gone on with, called once more."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.comparison import compare as comparing
from flexp.comparison import views
from flexp.comparison.compare import plan
from flexp.comparison.config import load
from flexp.comparison.report.results import results
from flexp.comparison.workers import Pool, Worker
from flexp.cost import probe as memory
from flexp.cost.probe import Measured, Probe
from tests.comparison.tools import Inline
from tests.report.test_html import own_part
from tests.tiny import bert_folder

from .test_commands import toml

TABLE = """
[compare]
methods = ["flexp-sfl", "alone"]
seeds = 1
trials = 2
[compare.variants.alone]
method = "local"
"""


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
def test_stopped_then_gone_on_with_then_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path, train={"rounds": 1, "steps_per_round": 1})
    path.write_text(path.read_text(encoding="utf-8") + TABLE, encoding="utf-8")
    where = tmp_path / "out"
    arguments = ["compare", str(path), "--out", str(where)]

    def call(*options: str) -> Result:
        done = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done

    listed = call("--dry-run")
    assert listed.output.splitlines()[-1] == f"6 runs in {where}"
    assert not where.exists()

    process = subprocess.Popen(
        [sys.executable, "-m", "flexp.cli.main", *arguments, "--jobs", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
    assert f"go on with the same command and --out {where}" in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(process.pid) == []
    kept = len(list(finished.rglob("summary.json")))
    assert 1 <= kept < 6
    assert not (tmp_path / "out/comparison.json").exists()

    monkeypatch.setattr(comparing, "Pool", Inline)  # its workers were seen; what is left is done here
    done = call("--jobs", "1")
    assert f"{6 - kept} runs to do, {kept} done before" in done.stdout
    content = json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8"))
    assert [(m["name"], m["method"], len(m["trials"]), len(m["runs"])) for m in content["methods"]] == [
        ("flexp-sfl", "flexp-sfl", 2, 1),
        ("alone", "local", 2, 1),
    ]

    stamps = {place: place.stat().st_mtime_ns for place in finished.rglob("*")}
    monkeypatch.setattr(comparing, "Pool", Pool)
    for log in (where).glob("worker-*.log"):
        log.unlink()
    again = call()
    assert "0 runs to do, 6 done before" in again.stdout
    assert {place: place.stat().st_mtime_ns for place in finished.rglob("*")} == stamps
    assert json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8")) == content
    for word in ("flexp-sfl", "alone", f"Saved in {where}"):
        assert word in again.stdout
    assert not list((where).glob("worker-*.log"))  # no worker was started


MB = 10**6
DEVICES = {
    "assign": ["phone", "laptop", "laptop"],
    "classes": {"phone": {"memory_bytes": 100 * MB}, "laptop": {"memory_bytes": 300 * MB}},
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Probe]:
    """Cells are done in this process, and memory is made up: 200 MB for every whole model, 20 for a block."""
    probes: list[Probe] = []

    def fake(probe: Probe, timeout: float) -> Measured:
        probes.append(probe)
        return Measured(1, 200 * MB * (1 + probe.extra_weights) if probe.cut is None else 20 * MB * probe.cut[0])

    monkeypatch.setattr(memory, "measure", fake)
    monkeypatch.setattr(comparing, "Pool", Inline)
    return probes


@pytest.mark.parametrize(
    "options", [pytest.param(["--trials", "2", "--seeds", "1"], marks=pytest.mark.slow), ["--no-tune", "--seeds", "2"]]
)
def test_methods_that_some_or_no_devices_can_hold(tmp_path: Path, measured: list[Probe], options: list[str]) -> None:
    """FedAvg (200 MB) loses the phone, pFedMe (400 MB) everybody: a result like the others, found out once."""
    bert_folder(tmp_path / "model")
    path, out = toml(tmp_path, devices=DEVICES, train={"rounds": 1, "steps_per_round": 1}), tmp_path / "out"
    arguments = ["compare", str(path), "--methods", "flexp-sfl,fedavg,pfedme", "--out", str(out)]
    seeds = [*range(int(options[-1]))]
    done = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    content = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    split, average, nobody = content["methods"]
    clients = [client["name"] for client in split["runs"][0]["clients"]]
    for method, dropped in ((split, []), (average, clients[:1]), (nobody, clients)):
        assert [run["seed"] for run in method["runs"]] == seeds
        assert [run["dropped"] for run in method["runs"]] == [dropped] * len(seeds)
    problem = "all 3 clients dropped: need 400 MB, have 300 MB"
    assert [method["problem"] for method in content["methods"]] == [None, None, problem]
    assert [run["rounds"] for run in nobody["runs"]] == [[]] * len(seeds)
    assert [client["peak_memory_bytes"] for client in nobody["runs"][0]["clients"]] == [400 * MB] * 3
    assert [client["available_bytes"] for client in average["runs"][0]["clients"]] == [100 * MB, None, None]
    assert all(trial["validation"] is None for trial in nobody["trials"])
    # What a participant spends is one number, whoever asks: per client, per round, at equal bytes.
    found = {result.name: result for result in results(content)}
    lost = found["fedavg"]
    last = average["runs"][0]["rounds"][-1]
    assert lost.bytes_up == pytest.approx(last["bytes_up"])
    assert lost.virtual_seconds == pytest.approx(
        sum(run["rounds"][-1]["virtual_seconds"] for run in average["runs"]) / len(seeds)
    )
    assert views.spent(last, "bytes", True) == pytest.approx((lost.bytes_up or 0) + (lost.bytes_down or 0))
    assert [at.seeds for at in found.values()] == [len(seeds)] * 3
    assert found["pfedme"].personal is None
    some = "1 of 3 clients dropped: need 200 MB, have 100 MB"
    page = own_part(out / "comparison.html")
    for shown in (done.output, page, (out / "table.md").read_text(encoding="utf-8")):
        assert f"fedavg: {some}" in " ".join(shown.split())
        assert f"pfedme: {problem}" in " ".join(shown.split())
    assert "not finished" not in page
    probes = len(measured)
    assert {probe.cut for probe in measured} == {None, (1, 4), (3, 4)}
    again = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert again.exit_code == 0
    assert "0 runs to do" in again.output
    assert len(measured) == probes
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8")) == content
    only = CliRunner().invoke(app, ["compare", "--report-only", "--out", str(out)], catch_exceptions=False)
    assert only.exit_code == 0
    assert json.loads((out / "comparison.json").read_text(encoding="utf-8")) == content
    if "--no-tune" not in options:
        return
    # A larger laptop is another configuration, in which all is done anew.
    more = ["--methods", "pfedme", "--set", f"devices.classes.laptop.memory_bytes={500 * MB}"]
    mended = CliRunner().invoke(app, [*arguments, *options, *more], catch_exceptions=False)
    assert mended.exit_code == 0
    content = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    (method,) = content["methods"]
    assert [len(run["dropped"]) for run in method["runs"]] == [1, 1]
    assert method["problem"] is None


def test_a_worker_that_died_idle_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipe is broken when the next cell comes."""
    path = toml(tmp_path)
    (first,) = (track.final[0] for track in plan(load(path, [], {"methods": ["local"], "seeds": 1, "tune": False})))
    ends: list[Any] = []

    def start(self: Pool, number: int) -> Worker:
        here, there = multiprocessing.Pipe()
        ends.append(there)
        process: Any = SimpleNamespace(join=lambda timeout=None: None, is_alive=lambda: False, terminate=lambda: None)
        return Worker(process, here)

    monkeypatch.setattr(Pool, "_start", start)
    with Pool(1, tmp_path) as pool:
        pool.give(first)
        ends[0].send(None)
        assert list(pool.take()) == [(first, None)]
        ends[0].close()
        pool.give(first)
        assert (len(ends), len(pool.workers), pool.free) == (2, 1, 0)
        assert ends[1].recv() == first
