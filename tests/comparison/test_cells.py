"""Which folder is a cell's work: by its whole configuration, what was planned for it aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.comparison.cells import Cell, _same_work, validation
from flexp.config import RunConfig
from flexp.files import write_json
from flexp.report.metrics import write_records


def run(cut: Any = (1, None), lr: float = 1e-4, privacy: Any = None, model: Any = None, **clients: Any) -> RunConfig:
    content = {
        "model": {"id": "arch:bert", **(model or {})},
        "privacy": privacy or {},
        "data": {"source": "rows.jsonl", "clients": {"cut": cut, **clients}},
        "train": {"personal": {"lr": lr}},
    }
    return RunConfig.model_validate(content)


PLANNED = [{"name": "a", "cut": [1, 4], "micro_batch": 2, "checkpointing": False}, {"name": "b", "cut": [2, 4]}]


def test_a_run_with_planned_cuts_is_the_cell_that_asked_for_a_plan(tmp_path: Path) -> None:
    asked, done = run("auto"), run(each=PLANNED)
    assert _same_work(done, asked)
    assert not _same_work(run(each=PLANNED, lr=2e-4), asked)
    assert _same_work(done, run(plan=str(tmp_path / "plan.json")))


def test_a_bound_s_defence_is_planned_as_well() -> None:
    bound = {"max_content_words": 0.2}
    done = run(each=PLANNED, privacy={**bound, "pool": True, "noise": 1.0}, model={"pooling": "mean"})
    assert _same_work(done, run("auto", privacy=bound))
    assert _same_work(done, run("auto", privacy={**bound, "noise": 1.0}, model={"pooling": "mean"}))
    for other in ({"noise": 2.0}, {"max_content_words": 0.3}, {"weight": 3.0}):
        assert not _same_work(done, run("auto", privacy={**bound, **other}))
    assert not _same_work(done, run(each=PLANNED, privacy=bound))


def test_a_plan_leaves_devices_as_they_were() -> None:
    asked = run("auto", each=[{"device": "phone"}, {"device": "laptop"}])
    classes = ("phone", "laptop", "phone")
    done = [{"name": name, "cut": [1, 4], "device": own} for name, own in zip("abc", classes, strict=True)]
    assert _same_work(run(each=done), asked)
    assert not _same_work(run(each=[{**one, "device": "phone"} for one in done]), asked)


def test_cuts_that_were_written_down_must_be_those() -> None:
    asked = run([1, 4])
    assert _same_work(run([1, 4]), asked)
    assert not _same_work(run([2, 4]), asked)
    assert not _same_work(run([1, 4], each=[{"cut": [2, 4]}]), asked)


def test_a_trial_is_scored_without_who_has_nothing_to_find_and_not_without_who_diverged(tmp_path: Path) -> None:
    """One client without entities in its validation data is no reason to choose no trial at all."""
    cell = Cell("local", "tune", 0, {}, run(), Path("cell"))
    (tmp_path / "cell").mkdir()
    write_json(tmp_path / "cell/summary.json", {"metric": "f1"})
    scores: list[dict[str, Any]] = [{"f1": 0.5, "loss": 1.0}, {"f1": None, "loss": 2.0, "undefined": ["f1"]}]

    def of(*sides: dict[str, Any]) -> tuple[float, float] | None:
        write_records(tmp_path / "cell/metrics.jsonl", [
            {"kind": "eval", "round": 1, "client": str(place), "validation": own} for place, own in enumerate(sides)
        ])  # fmt: skip
        return validation(cell, tmp_path)

    assert of(*scores) == (0.5, 1.5)
    assert of(scores[1]) is None
    assert of(scores[0], {"f1": None, "loss": None, "not_finite": 3}) is None
    assert of(scores[0], {"f1": 0.3, "loss": None}) is None  # of an older version
