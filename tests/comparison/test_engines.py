"""Who does cells elsewhere: the same comparison, and cells whose worker was lost are done again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexp._version import __version__
from flexp.comparison.cells import Cell
from flexp.comparison.compare import compare
from flexp.comparison.config import Needs
from flexp.comparison.engines import REPEATS, Elsewhere, do, engine_of
from flexp.errors import ConfigError

from .tools import comparison

SMALL = {"methods": ["local", "flexp-sfl"], "seeds": 1, "tune": False}


class Lost:
    """Cells whose worker is lost a number of times, by a scheduler that ends one after the other."""

    def __init__(self, times: int) -> None:
        self.times, self.given = times, list[str]()

    def submit(self, cell: Any) -> int:
        self.given.append(cell.name)
        return len(self.given)

    def result(self, job: int) -> str | None:
        if self.given[job - 1] == "lost" and self.given[:job].count("lost") <= self.times:
            raise RuntimeError("the node died")
        return None


@pytest.mark.parametrize("times", [REPEATS, REPEATS + 1])
def test_who_loses_its_worker_is_given_out_again(times: int) -> None:
    cells: list[Any] = [SimpleNamespace(name=name) for name in ("lost", "good")]
    scheduler, closed = Lost(times), list[Any]()
    with Elsewhere(2, scheduler.submit, lambda jobs: jobs[:1], scheduler.result, closed.extend) as engine:
        assert (engine.free, engine.busy) == (2, False)
        for cell in cells:
            engine.give(cell)
        assert (engine.free, engine.busy) == (0, True)
        found = dict[str, str | None]()
        while engine.busy:
            found |= {cell.name: problem for cell, problem in engine.take()}
        engine.give(cells[1])
    assert found["good"] is None
    assert (found["lost"] is None) == (times == REPEATS), found
    assert scheduler.given.count("lost") == REPEATS + 1
    assert len(closed) == 1  # what was still under way


@pytest.mark.parametrize("name", ["condor", "dask"])
def test_no_such_engine(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected local, ray, ray:ADDRESS, dask:ADDRESS"):
        engine_of(name, 1, tmp_path, Needs())


def test_a_worker_that_others_cannot_read_does_nothing(tmp_path: Path) -> None:
    cell: Any = SimpleNamespace(name="one", folder=Path("cells/one"))
    assert "does not see" in (do(cell, str(tmp_path / "mine"), 1, __version__) or "")
    assert "expected 0.0.1" in (do(cell, str(tmp_path), 1, "0.0.1") or "")
    assert not list(tmp_path.iterdir())


def kill_once(cell: Cell, out: str, threads: int, version: str) -> str | None:
    """The first attempt at a cell ends its process."""
    mark = Path(out) / f"killed-{cell.entry}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return do(cell, out, threads, version)


@contextmanager
def cluster(name: str) -> Iterator[str]:
    """What is said of the engine, while it is there."""
    if name != "dask":
        yield name
        return
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as workers:
        yield f"dask:{workers.scheduler_address}"


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [("ray", "ray"), ("distributed", "dask"), ("submitit", "slurm:local")])
def test_the_comparison_is_the_same(
    home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    """As done in this process, though the first worker of each cell is killed."""
    pytest.importorskip(package, reason=f"{package} is an extra")
    wanted = comparison(home, SMALL, train={"rounds": 1, "steps_per_round": 2})
    root = Path(__file__).parents[2]
    there = [root / "src", root, os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, there)))
    monkeypatch.setattr("flexp.comparison.engines.do", kill_once)
    with cluster(name) as engine:
        found = compare(wanted, home / "elsewhere", 2, engine=engine)
    compare(wanted, home / "here", 1)
    assert not found.failures
    assert (found.done, len(ended)) == (2, 2)
    assert len(list(home.glob("elsewhere/killed-*"))) == 2
    assert without_seconds(home / "elsewhere") == without_seconds(home / "here")


def without_seconds(out: Path) -> Any:
    """``comparison.json`` without what differs from one run to the next."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(each) for key, each in value.items() if "seconds" not in key and key != "memory"}
        return [cleaned(each) for each in value] if isinstance(value, list) else value

    return cleaned(json.loads((out / "comparison.json").read_text(encoding="utf-8")))
