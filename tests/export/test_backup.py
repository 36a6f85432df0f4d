"""Backup → restore → continue is as if nothing had happened, bit for bit; and nothing goes where it does not belong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexp.errors import ConfigError, StorageError
from flexp.export.backup import back_up, read, restore, write
from flexp.export.joining import join
from flexp.files import sha256
from flexp.run import runner
from tests.methods.tools import equal
from tests.tiny import bert_folder, checkpoint, config

FOLLOWS = {"kind": "weights", "teach": True, "follow": True, "pull": 1.0}


def stopped(home: Path, name: str, rounds: int = 2, **tables: Any) -> Path:
    """A run that was stopped after its first round, of ``rounds``."""
    run = config(home, **{**tables, "train": {"rounds": rounds, **tables.get("train", {})}})
    runner.run(run.model_copy(update={"train": run.train.model_copy(update={"rounds": 1})}), home / name)
    (home / name / "config.json").write_text(json.dumps(run.resolved()), encoding="utf-8")
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backup")
    bert_folder(folder / "model", dropout=True)
    stopped(folder, "run")
    back_up(folder / "run", "south", folder / "south.safetensors")
    return folder


def last(run: Path) -> Any:
    return checkpoint(run)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> tuple[Any, Any]:
    """What the run comes to when nothing is lost: its weights, and its scores."""
    run = shutil.copytree(home / "run", home / "undisturbed")
    scores = runner.resume(run)["scores"]
    return last(run), scores


@pytest.mark.parametrize("passphrase", [None, "four words of one's own"])
def test_backup_restore_continue_is_bit_identical(
    home: Path, tmp_path: Path, undisturbed: tuple[Any, Any], passphrase: str | None
) -> None:
    lost = shutil.copytree(home / "run", tmp_path / "lost")
    file = tmp_path / "south.safetensors"
    facts = back_up(lost, "south", file, passphrase)
    assert (facts["client"], facts["round"], facts["steps"], facts["cut"]) == ("south", 1, 2, [2, 4])
    assert read(file, passphrase).encrypted == (passphrase is not None)
    before = last(lost)
    victim = next((lost / "checkpoints/checkpoint-00000001").glob("*south*"))
    victim.unlink()  # what was read is mapped from it
    victim.write_bytes(b"lost")
    with pytest.raises(StorageError, match="SHA-256"):
        runner.resume(lost)
    assert restore(file, lost, passphrase=passphrase)["into"] == 1
    after = last(lost)
    assert before.keys() == after.keys()
    assert all(equal(state, after[party]) for party, state in before.items())
    summary, (left, scores) = runner.resume(lost), undisturbed
    right = last(lost)
    for party, state in left.items():
        timed = {name for name in state if "seconds" in name}
        assert equal(*({n: v for n, v in found[party].items() if n not in timed} for found in (left, right)))
    assert summary["scores"] == scores


def test_weights_that_are_no_numbers_do_not_come_back(home: Path, tmp_path: Path) -> None:
    found = read(home / "south.safetensors")
    name = next(name for name in found.tensors if name.startswith("personal/"))
    spoilt = found.tensors | {name: torch.full_like(found.tensors[name], float("nan"))}
    write(tmp_path / "spoilt.safetensors", spoilt, found.facts)
    before = last(home / "run")
    with pytest.raises(StorageError, match=f"{re.escape(name)} holds numbers that are not finite"):
        restore(tmp_path / "spoilt.safetensors", home / "run")
    assert all(equal(state, last(home / "run")[party]) for party, state in before.items())


def test_it_holds_one_client_alone_and_names_no_folder(home: Path) -> None:
    found = read(home / "south.safetensors")
    state = last(home / "run")["client-south"]
    assert equal(found.tensors, state)
    assert equal(found.weights, {name[9:]: value for name, value in state.items() if name.startswith("personal/")})
    assert {name.partition(".")[0] for name in found.weights} == {"bert", "classifier"}
    assert not [name for name in found.weights if ".layer.2." in name or ".layer.3." in name]  # the server's
    for secret in (str(home), "north", "rows.jsonl"):
        assert secret.encode() not in (home / "south.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"data": {"clients": {"each": [{"cut": [1, 4]}, {"cut": [1, None]}, {"cut": [3, 4]}]}}},
            r"another cut .*\[2, 4\], not \[1, 4\]",
        ),
        ({"model": {"tuning": "lora"}}, r"another model.tuning than .*\(full, not lora\)"),
        ({"method": {"name": "fedper"}}, r"another method.name .*\(flexp-sfl, not fedper\)"),
        ({"train": {"personal": {"name": "sgd"}}}, r"another train.personal.name .*\(adamw, not sgd\)"),
        ({"method": {"align": FOLLOWS}}, r"another method.align.follow .*\(false, not true\)"),
        ({"data": {"template": "the {text}"}}, r"another data.template .*\(null, not the {text}\)"),
        ({"data": {"max_length": 5}}, r"another data.max_length .*\(16, not 5\)"),
        ({"other": True}, r"another pretrained model \(its weights differ\)"),
    ],
)
def test_it_goes_nowhere_else(home: Path, tmp_path: Path, tables: dict[str, Any], message: str) -> None:
    if tables.pop("other", False):
        bert_folder(tmp_path / "model", dropout=True)
        weights = next((tmp_path / "model").glob("*.safetensors"))
        others = {name: value + (".layer.1." in name) for name, value in load_file(weights).items()}
        weights.unlink()
        save_file(others, weights, metadata={"format": "pt"})
        tables["model"] = {"id": str(tmp_path / "model")}
    else:
        tables["model"] = {"id": str(home / "model"), **tables.get("model", {})}
    run = stopped(tmp_path, "run", **tables)
    before = {path: sha256(path) for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=message) as caught:
        restore(home / "south.safetensors", run)
    assert "\n" not in str(caught.value)
    assert {path: sha256(path) for path in run.rglob("*") if path.is_file()} == before


def test_what_a_classifier_reads_must_be_the_same(home: Path, tmp_path: Path) -> None:
    """Heads on a mean and on a last token have equal shapes; whoever starts from such a file must pool alike, too."""
    model = {"id": str(home / "model"), "tuning": "lora"}
    pools = {"last": ("last", False), "mean": ("mean", False), "pool": ("mean", True)}
    runs = {
        name: stopped(
            tmp_path,
            name,
            model={**model, "pooling": pooling},
            privacy={"pool": pool},
            method={"align": {"kind": "off"}},
        )
        for name, (pooling, pool) in pools.items()
    }
    file = tmp_path / "south.safetensors"
    back_up(runs["mean"], "south", file)
    for name, message in (
        ("last", r"another model.pooling than .* \(mean, not last\)"),
        ("pool", r"another privacy.pool than .* \(false, not true\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            restore(file, runs[name])
        with pytest.raises(ConfigError, match=message):
            join(runs[name], "east", tmp_path / "east", data=str(tmp_path / "rows.jsonl"), start=[str(file)])
    assert restore(file, runs["mean"])["into"] == 1


def test_a_file_of_an_older_version_finds_back(home: Path, tmp_path: Path) -> None:
    """What it does not say is not compared."""
    found = read(home / "south.safetensors")
    newer = ("follow", "pooling", "pool", "template", "max_length")
    write(tmp_path / "older", found.tensors, {key: value for key, value in found.facts.items() if key not in newer})
    run = shutil.copytree(home / "run", tmp_path / "run")
    assert restore(tmp_path / "older", run)["into"] == 1


def test_every_methods_own_state(home: Path, tmp_path: Path) -> None:
    run = stopped(tmp_path, "run", model={"id": str(home / "model")}, method={"name": "ditto"})
    before = last(run)
    back_up(run, "north", tmp_path / "north.safetensors")
    restore(tmp_path / "north.safetensors", run)
    assert all(equal(state, before[party]) for party, state in last(run).items())
    assert runner.resume(run)["finished"]


def test_damage_is_named(home: Path, tmp_path: Path) -> None:
    file = shutil.copyfile(home / "south.safetensors", tmp_path / "x.safetensors")
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "SHA-256 differs"),
        (whole.replace(b'\\"round\\": 1', b'\\"round\\": 7'), "SHA-256 differs"),
        (whole[:-10], "or damaged"),
        (b"not this", "or damaged"),
    ):
        assert damaged != whole
        file.write_bytes(damaged)
        with pytest.raises(StorageError, match=message) as caught:
            restore(file, home / "run")
        assert "\n" not in str(caught.value)
    write(file, {"x": torch.zeros(1)}, {"kind": "something else"})
    with pytest.raises(StorageError, match="of another version"):
        read(file)


def test_what_cannot_be_backed_up(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        back_up(home / "run", "south", home / "south.safetensors")
    with pytest.raises(ConfigError, match="the run has no client 'nobody'"):
        back_up(home / "run", "nobody", tmp_path / "x")
    with pytest.raises(ConfigError, match="say whose model"):
        back_up(home / "run", None, tmp_path / "x")
    found = read(home / "south.safetensors")
    write(tmp_path / "thin", {n: v for n, v in found.tensors.items() if "classifier" not in n}, found.facts)
    with pytest.raises(StorageError, match=r"personal/classifier.* is not in the file"):
        restore(tmp_path / "thin", home / "run")
