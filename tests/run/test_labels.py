"""A checkpoint with a perfect head, its classes in another order than the alphabet's: perfect in every use."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexp.config.loading import validate
from flexp.export.answers import predict, score
from flexp.export.folder import export
from flexp.export.joining import join
from flexp.export.opening import open_trained
from flexp.run import runner
from flexp.run.settle import settle_client
from tests.data.tools import jsonl
from tests.models.test_heads import KNOWN, named
from tests.tiny import bert_folder, content


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and data whose labels are what plain transformers predicts."""
    folder = tmp_path_factory.mktemp("labels")
    model = named(bert_folder(folder / "model"), KNOWN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    texts = [f"w{k % 40} {['dog', 'cat', 'bird', 'the', 'red'][k % 5]} w{k // 3 % 40} runs" for k in range(120)]
    with torch.no_grad():
        logits = plain(**tokenizer(texts, return_tensors="pt")).logits
        plain.classifier.bias -= logits.mean(0)  # so that it predicts every class
        logits -= logits.mean(0)
    plain.save_pretrained(model)
    rows = [
        {"text": text, "label": KNOWN[int(row.argmax())], "client": ("north", "south")[k % 2]}
        for k, (text, row) in enumerate(zip(texts, logits, strict=True))
    ]
    assert len({row["label"] for row in rows}) == 3
    jsonl(folder / "perfect.jsonl", rows)
    return folder


def changed(place: Path) -> dict[str, Any]:
    found = content(
        place, train={"rounds": 1, "steps_per_round": 1}, data={"clients": {"cut": [1, 3], "names": ["north"]}}
    )
    found["data"]["source"] = str(place / "perfect.jsonl")
    found["train"] |= {"personal": {"lr": 1e-9}, "shared": {"lr": 1e-9}}
    return found


def run(place: Path) -> dict[str, Any]:
    """A run of one step that changes nothing, once."""
    if not (place / "run").exists():
        runner.run(validate(changed(place), "test"), place / "run")
    return json.loads((place / "run" / "summary.json").read_text())  # type: ignore[no-any-return]


def test_a_perfect_classifier_is_perfect_in_every_use(place: Path) -> None:
    summary = run(place)
    assert summary["model"]["labels"] == KNOWN
    assert [client["before"]["personal"] for client in summary["clients"]] == [1.0]
    opened = open_trained(place / "run", "north")
    assert all(found["accuracy"] == 1.0 for found in score(opened, str(place / "perfect.jsonl")).values())
    predict(opened, str(place / "perfect.jsonl"), place / "found.csv")
    wanted = [json.loads(line)["label"] for line in (place / "perfect.jsonl").read_text().splitlines()]
    with (place / "found.csv").open() as file:
        assert [row["predicted"] for row in csv.DictReader(file)] == wanted
    export(opened, place / "out")
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(place / "out").eval()
    texts = [json.loads(line)["text"] for line in (place / "perfect.jsonl").read_text().splitlines()]
    batch = transformers.AutoTokenizer.from_pretrained(place / "out")(texts, return_tensors="pt")
    with torch.no_grad():
        rows = exported(**batch).logits.argmax(-1).tolist()
    assert [exported.config.id2label[row] for row in rows] == wanted
    joined = join(place / "run", "south", place / "south", steps=1, settings=["train.personal.lr=1e-9"])
    assert joined["clients"][0]["before"]["personal"] == 1.0


def test_who_has_their_own_data_only_has_the_same_classes(place: Path) -> None:
    found = changed(place)
    rows = [json.loads(line) for line in (place / "perfect.jsonl").read_text().splitlines()]
    found["data"]["source"] = str(jsonl(place / "own.jsonl", [row for row in rows if row["label"] != "maybe"]))
    own = settle_client(validate(found, "test"), "north", None)
    assert own.run.federation.task.label_names == KNOWN


def test_a_run_keeps_the_order_that_it_was_trained_with(place: Path) -> None:
    """Here, of a version of FlexP that sorted the labels whatever the checkpoint said."""
    summary = run(place)
    shutil.copytree(place / "run", place / "old")
    summary["model"]["labels"] = sorted(KNOWN)
    (place / "old" / "summary.json").write_text(json.dumps(summary))
    assert open_trained(place / "old", "north").labels == sorted(KNOWN)
