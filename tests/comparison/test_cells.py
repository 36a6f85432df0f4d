"""Which folder is a cell's work: by its whole configuration, what was planned for it aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.comparison.cells import _work
from flexp.config import RunConfig


def run(cuts: Any, lr: float = 1e-4, **clients: Any) -> RunConfig:
    content = {
        "model": {"id": "arch:bert"},
        "data": {"source": "rows.jsonl", "clients": {"cuts": cuts, **clients}},
        "train": {"personal": {"lr": lr}},
    }
    return RunConfig.model_validate(content)


def test_a_run_with_planned_cuts_is_the_cell_that_asked_for_a_plan(tmp_path: Path) -> None:
    asked, done = run("auto"), run([[1, 4]], micro_batches=[2], checkpointing=[False])
    assert _work(done, asked) == _work(asked, asked)
    assert _work(run([[1, 4]], lr=2e-4), asked) != _work(asked, asked)
    by_file = run([[1, None]], plan=str(tmp_path / "plan.json"))
    assert _work(done, by_file) == _work(by_file, by_file)


def test_cuts_that_were_written_down_must_be_those() -> None:
    asked = run([[1, 4]])
    assert _work(run([[1, 4]]), asked) == _work(asked, asked)
    assert _work(run([[2, 4]]), asked) != _work(asked, asked)
