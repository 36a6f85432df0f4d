"""Opening a run: which round, whose model, and one line for what is not there. The run's folder stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from flexp.errors import ConfigError, StorageError
from flexp.export.backup import back_up, restore
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import open_run
from flexp.files import sha256

from .tools import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"max_length": 16, "validation_fraction": 0.3, "clients": {"each": [{"cut": [1, 3]}, {"cut": [2, None]}]}}
    folder = tmp_path_factory.mktemp("saved")
    data["source"] = str(folder / "rows.jsonl")
    return train(folder, "bert", data=data, train={"rounds": 3})


def content(folder: Path) -> dict[str, tuple[str, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (sha256(path), path.stat().st_mtime_ns) for path in files}


def test_the_round_that_was_asked_for(run: Path) -> None:
    before = content(run)
    last, second = open_run(run), open_run(run, "2")
    assert (last.round, second.round) == (3, 2)
    weights = [opened.method.trained_weights("north") for opened in (last, second)]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    best = open_run(run, "best")
    assert best.picked_on == "validation"
    accuracies = {
        number: sum(scores[name]["validation"] or 0.0 for name in ("north", "south"))
        for number, scores in best.scored.items()
        if number
    }
    assert accuracies[best.round] == max(accuracies.values())
    assert content(run) == before


def test_the_only_client_need_not_be_named(run: Path, tmp_path: Path) -> None:
    assert open_run(train(tmp_path, "bert", clients=("alone",))).client(None).name == "alone"
    with pytest.raises(ConfigError, match="say whose model with --client; the run has 'north', 'south'"):
        open_run(run).client(None)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("7", r"no checkpoint 7; it has (1, )?2, 3"),
        ("first", r"--round first: expected a number or last"),
        ("-1", r"--round -1: expected"),
    ],
)
def test_a_round_that_is_not_there(run: Path, which: str, message: str) -> None:
    with pytest.raises((ConfigError, StorageError), match=message) as caught:
        open_run(run, which)
    assert "\n" not in str(caught.value)


def test_a_client_that_is_not_there(run: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no client 'nort'; did you mean 'north'") as caught:
        open_run(run).client("nort")
    assert "\n" not in str(caught.value)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="holds no run"):
        open_run(tmp_path)


def test_no_checkpoints(tmp_path: Path) -> None:
    place = train(tmp_path, "bert", output={"checkpoint_every": 0, "tensorboard": False, "html": False})
    with pytest.raises(StorageError, match=r"has no checkpoint \(output.checkpoint_every = 0 keeps none\)") as caught:
        open_run(place)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    victim = next((copy / "checkpoints/checkpoint-00000003").glob("*north*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError, match="SHA-256"):
        open_run(copy)
    assert open_run(copy, "2").round == 2


def test_what_was_put_back_has_no_scores_of_the_newer_round(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    own = open_trained(run, "north").facts()
    for number in (2, 3):
        back_up(run, "north", tmp_path / f"{number}.safetensors", which=str(number))
    restore(tmp_path / "2.safetensors", run)
    facts = export(open_trained(run, "north"), tmp_path / "out")
    assert (facts["round"], facts["restored"]) == (3, 2)
    assert facts["scores"] == {**own["scores"], "after": None}
    assert "own part is from after round 2, and was put back" in (tmp_path / "out/README.md").read_text("utf-8")
    other = open_trained(run, "south").facts()
    assert other["scores"]["after"] is not None is other["restored"]
    restore(tmp_path / "3.safetensors", run)  # what it had in this round
    assert open_trained(run, "north").facts() == own


def test_other_clients_than_the_runs(tmp_path: Path) -> None:
    place = train(tmp_path, "bert")
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(rows.replace("south", "east"), encoding="utf-8")
    with pytest.raises(StorageError, match="client-east is in the checkpoint or in the data, not in both"):
        open_run(place)
