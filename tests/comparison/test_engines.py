"""Who does cells elsewhere: the same comparison, and cells whose worker was lost are done again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flexp.comparison.cells import Cell
from flexp.comparison.compare import compare
from flexp.comparison.config import Needs
from flexp.comparison.engines import REPEATS, Elsewhere, engine_of
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
    from types import SimpleNamespace

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


def test_no_such_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected local or slurm"):
        engine_of("condor", 1, tmp_path, Needs())


def kill_once(cell: Cell, out: str, threads: int) -> str | None:
    """The first attempt at a cell ends its process."""
    mark = Path(out) / f"killed-{cell.entry}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    from flexp.comparison.workers import attempt

    return attempt(cell, Path(out), threads)


@pytest.mark.slow
def test_the_comparison_is_the_same(home: Path, ended: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    """As done in this process, though the first worker of each cell is killed."""
    pytest.importorskip("submitit", reason="submitit is an extra")
    wanted = comparison(home, SMALL, train={"rounds": 1, "steps_per_round": 2})
    root = Path(__file__).parents[2]
    there = [root / "src", root, os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, there)))
    monkeypatch.setattr("flexp.comparison.engines.do", kill_once)
    found = compare(wanted, home / "elsewhere", 2, engine="slurm:local")
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
