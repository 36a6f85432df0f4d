"""``train.early_stopping`` in a run and over a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexp.comparison.config import CompareConfig, make
from flexp.config import DeploymentConfig
from flexp.config.train import EarlyStopping
from flexp.errors import ConfigError
from flexp.files import read_json
from flexp.report.metrics import read
from flexp.run.diary import check_conducted, ended
from flexp.run.runner import resume, run
from flexp.run.store import CHECKPOINTS, Store
from tests.tiny import bert_folder, config

from .tools import fleet


@pytest.mark.parametrize(
    ("scores", "higher", "stops"),
    [
        ([0.5, 0.6, 0.6, 0.6], True, True),
        ([0.5, 0.6, 0.6], True, False),
        ([0.5, 0.6, 0.55, 0.65], True, False),
        ([3.0, 2.0, 2.0, None], False, True),
        ([3.0, 2.0, 2.5, 1.9], False, False),
        ([0.5, 0.6, 0.609, 0.609], True, True),
    ],
)
def test_patience(scores: list[float | None], higher: bool, stops: bool) -> None:
    said = EarlyStopping(patience=2, min_delta=0.01)
    assert ended(dict(enumerate(scores)), said, higher) is stops
    assert not ended(dict(enumerate(scores)), EarlyStopping(), higher)


def settings(home: Path, **train: Any) -> Any:
    """A run that cannot get better: its rates are next to nothing."""
    if not (home / "model").exists():
        bert_folder(home / "model")
    still = {"personal": {"lr": 1e-12}, "shared": {"lr": 1e-12}}
    return config(
        home,
        data={"validation_fraction": 0.3},
        train={"rounds": 5, "steps_per_round": 1, "early_stopping": {"patience": 2}, **still, **train},
        output={"tensorboard": False, "html": False},
    )


def test_a_run_stops_and_does_not_go_on(tmp_path: Path) -> None:
    summary = run(settings(tmp_path), tmp_path / "out")
    assert (summary["finished"], summary["rounds"]) == (True, 2)
    assert max(Store(tmp_path / "out" / CHECKPOINTS).numbers()) == 2
    again = resume(tmp_path / "out")
    assert (again["rounds"], again["finished"]) == (2, True)
    assert [r["round"] for r in read(tmp_path / "out" / "metrics.jsonl") if r["kind"] == "round"] == [1, 2]


def test_every_client_of_a_free_run_stops_for_itself(tmp_path: Path) -> None:
    names = ["north", "south", "west"]
    deployment = DeploymentConfig(schedule="free", clients=names)
    fleet(settings(tmp_path), deployment, tmp_path)
    for name in names:
        records = read(tmp_path / "clients" / name / "metrics.jsonl")
        assert max(record["round"] for record in records) == 2
        assert all("validation" in record for record in records if record["kind"] == "eval")
        facts = Store(tmp_path / "clients" / name / "snapshots").newest_whole()
        assert facts is not None
        assert facts.facts["steps"] == 2
    assert read_json(tmp_path / "clients" / "north" / "client.json")["client"] == "north"


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"looks at validation data: set data.validation_fraction"):
        config(tmp_path, train={"early_stopping": {"patience": 2}}, data={"validation_fraction": 0.0})
    with pytest.raises(ConfigError, match=r'set deployment.schedule = "free", where every client stops for itself'):
        check_conducted(settings(tmp_path).train, "deterministic")
    with pytest.raises(ConfigError, match="compared after equally many steps; leave it out"):
        make(settings(tmp_path), CompareConfig(methods=["local"], seeds=[0]))
