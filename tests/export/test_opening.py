"""An exported model is scored on the test data of its own run, and of no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.errors import ConfigError, DataError, FlexpError
from flexp.export.answers import score
from flexp.export.folder import export
from flexp.export.opening import open_trained
from tests.data.tools import jsonl, labelled

from .tools import CLIENTS, train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening")
    export(open_trained(train(folder, "bert"), "south"), folder / "out")
    return folder


def other(home: Path, folder: Path, **tables: Any) -> Path:
    """A run that was stopped before its first round, with other settings than the one in ``home``."""
    content = json.loads((home / "run/config.json").read_text(encoding="utf-8"))
    for table, value in tables.items():
        content[table] = {**content[table], **value} if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "metrics.jsonl").touch()
    return folder


def older(home: Path, folder: Path) -> Path:
    """The exported model as it was written before it said which examples it was trained on."""
    shutil.copytree(home / "out", folder)
    facts = json.loads((folder / "flexp.json").read_text(encoding="utf-8"))
    del facts["identity"], facts["pretrained"]
    (folder / "flexp.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def others(home: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Runs that the model is not of, and what is said of each; of all but the last two by older folders, too."""
    named = jsonl(folder / "named.jsonl", labelled(60, CLIENTS, labels=("bad", "good")))
    model = shutil.copytree(home / "model", folder / "model")
    weights = next(model.glob("*.safetensors"))
    changed = {name: value + (".layer.1." in name) for name, value in load_file(weights).items()}
    weights.unlink()
    save_file({name: value.contiguous() for name, value in changed.items()}, weights, metadata={"format": "pt"})
    return {
        "labels": (other(home, folder / "a", data={"source": str(named)}), "bad, good.* trained for no, yes"),
        "seed": (other(home, folder / "b", seed=7), "south has other train examples|has the seed 7"),
        "kind": (other(home, folder / "c", data={"task": "regression"}), "is of the task regression"),
        "text": (other(home, folder / "d", data={"task": "causal-lm"}), "is of the task causal-lm"),
        "length": (other(home, folder / "e", data={"max_length": 4}), "south has other train examples"),
        "model": (other(home, folder / "f", model={"id": str(model)}), "started from another pretrained model"),
    }


def test_another_runs_test_data_are_refused(home: Path, tmp_path: Path) -> None:
    """They may be what it was trained on, or mean something else."""
    before = older(home, tmp_path / "older")
    found = others(home, tmp_path)
    for key, (run, message) in found.items():
        for place in (home / "out", before) if key not in ("length", "model") else (home / "out",):
            with pytest.raises(FlexpError, match=message) as caught:
                score(open_trained(place, run=run))
            assert isinstance(caught.value, (ConfigError, DataError)), key
            assert "name the run that it was exported from, or score on a file with --data" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_what_an_older_folder_cannot_tell_is_said(home: Path, tmp_path: Path) -> None:
    own = open_trained(home / "out", run=home / "run")
    scores = score(own)
    assert own.unchecked is None
    place = older(home, tmp_path / "older")
    assert score(open_trained(place, run=home / "run")) == scores
    said = CliRunner().invoke(app, ["evaluate", str(place), "--run", str(home / "run"), "--json"])
    assert said.exit_code == 0
    assert "does not say which examples it was trained on" in said.stderr
    assert torch.isfinite(torch.tensor(json.loads(said.stdout)["scores"]["personal"]["own test data"]["loss"]))
