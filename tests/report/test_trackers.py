"""MLflow and Weights & Biases beside TensorBoard, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from flexp.config import RunConfig
from flexp.errors import ConfigError
from flexp.report.tensorboard import writer_of

RECORDS: list[dict[str, Any]] = [
    {"kind": "step", "client": "ärzte", "step": 1, "round": 1, "loss": 0.5, "lr": 0.1},
    {"kind": "eval", "client": "ärzte", "round": 1, "personal": {"accuracy": 0.75, "n": 4, "confusion": [[1]]}},
    {"kind": "round", "round": 1, "seconds": 2.0, "bytes_up": 3, "bytes_down": 4},
]


def wanted(*kinds: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "model": {"id": "none"},
            "data": {"source": "-"},
            "output": {"report_to": list(kinds), "tensorboard": False},
        }
    )


def write(folder: Path, config: RunConfig, records: list[dict[str, Any]]) -> None:
    writer = writer_of(folder, config, None)
    assert writer is not None
    for record in records:
        writer.write(record)
    writer.close()


def test_mlflow_has_one_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write(tmp_path, wanted("mlflow"), RECORDS[:2])
    write(tmp_path, wanted("mlflow"), RECORDS[2:])
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("flexp").experiment_id])
    assert run.info.run_name == "trial"
    assert run.data.params["task"] == "classification"
    assert run.data.metrics["ärzte/train/loss"] == 0.5
    assert run.data.metrics["ärzte/personal/accuracy"] == 0.75
    assert run.data.metrics["federation/federation/seconds"] == 2.0
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": run.info.run_id}


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, values, **kw: (logged.append(values), log(self, values, **kw))[1]
    )
    write(tmp_path, wanted("wandb"), RECORDS)
    assert {"ärzte/train/loss": 0.5, "ärzte/train/lr": 0.1, "ärzte/step": 1} in logged
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_what_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "is_wandb_available", lambda: False)
    with pytest.raises(ConfigError, match=r"output.report_to: wandb is not installed: pip install 'flexp\[trackers\]'"):
        writer_of(tmp_path, wanted("wandb"), None)
