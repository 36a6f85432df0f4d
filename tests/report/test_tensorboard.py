from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flexp.errors import StorageError
from flexp.report.tensorboard import EventWriter, _of_client

from . import synthetic


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_losses_by_step_and_means_by_round(tmp_path: Path) -> None:
    diary = synthetic.records(("a", "b"), rounds=2, steps=3)
    with EventWriter(tmp_path) as writer:
        for record in diary:
            writer.write(record)
    losses = [record["loss"] for record in diary if record["kind"] == "step" and record["client"] == "b"]
    assert scalars(tmp_path / "b", "train/loss") == [
        (step, pytest.approx(loss)) for step, loss in enumerate(losses, start=1)
    ]
    assert [step for step, _ in scalars(tmp_path / "a", "personal/accuracy")] == [0, 3, 6]
    means = scalars(tmp_path / "federation", "personal/accuracy_mean")
    evals = [record for record in diary if record["kind"] == "eval" and record["round"] == 2]
    expected = sum(record["personal"]["accuracy"] for record in evals) / 2
    assert [step for step, _ in means] == [0, 1, 2]
    assert means[-1][1] == pytest.approx(expected)


def test_there_is_no_mean_without_a_client(tmp_path: Path) -> None:
    with EventWriter(tmp_path) as writer:
        for client, auc in (("a", None), ("b", 0.9)):
            writer.write({"kind": "eval", "round": 0, "client": client, "personal": {"accuracy": 0.5, "auc": auc}})
    assert [value for _, value in scalars(tmp_path / "federation", "personal/accuracy_mean")] == [0.5]
    with pytest.raises(KeyError):
        scalars(tmp_path / "federation", "personal/auc_mean")


def test_a_resumed_run_does_not_double_back(tmp_path: Path) -> None:
    diary = synthetic.records(("a", "b"), rounds=3, steps=4)
    with EventWriter(tmp_path) as writer:
        for record in diary:
            writer.write(record)
    time.sleep(1.1)  # files of one second and one process are read in the order of a counter's digits, 10 before 9
    kept = [record for record in diary if record["round"] <= 1]
    later = [{**record, "loss": 9.0} if record["kind"] == "step" else record for record in diary if record["round"] > 1]
    with EventWriter(tmp_path, kept) as writer:
        for record in later:
            writer.write(record)
    losses = scalars(tmp_path / "a", "train/loss")
    assert [step for step, _ in losses] == list(range(1, 13))
    assert [value == 9.0 for _, value in losses] == [False] * 4 + [True] * 8
    assert [step for step, _ in scalars(tmp_path / "federation", "federation/bytes_up")] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path / "a", "global/accuracy")] == [0, 4, 8, 12]


def test_closing_twice_is_fine_and_writing_after_is_refused(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path)
    writer.write({"kind": "step", "client": "a", "step": 1, "loss": None, "align": None, "seconds": 0.0})
    writer.close()
    writer.close()
    with pytest.raises(StorageError, match="closed"):
        writer.write({"kind": "round", "round": 1})


def test_folder_names_are_safe_and_distinct() -> None:
    assert _of_client("Tweets") == "Tweets"
    names = ["../../etc", "a/b", "a b", "a-b", "federation", "Federation", "", "…", "x" * 300, "x" * 301]
    made = [_of_client(name) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        assert "/" not in name
        assert not name.startswith(".")
        assert 0 < len(name) <= 60
        assert name.lower() != "federation"
