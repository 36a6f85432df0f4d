"""A trained head whose classes come in another order than the data's: every class keeps the row of its name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flexp
from flexp.models.loading import load_stage
from flexp.models.zoo import save_tiny

KNOWN = ["yes", "maybe", "no"]  # not sorted
IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return named(save_tiny("bert", tmp_path_factory.mktemp("bert")), KNOWN)


def named(folder: Path, names: list[str] | None) -> Path:
    """Give a checkpoint's classes names."""
    facts = json.loads((folder / "config.json").read_text())
    names = names or [f"LABEL_{row}" for row in range(3)]
    facts["id2label"] = {str(row): name for row, name in enumerate(names)}
    facts["label2id"] = {name: row for row, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def plain(folder: Path) -> Any:
    auto = transformers.AutoModelForSequenceClassification
    if json.loads((folder / "config.json").read_text())["model_type"] == "vit":
        auto = transformers.AutoModelForImageClassification
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        (["no", "maybe", "yes"], [2, 1, 0]),
        (["maybe", "new", "no"], [1, None, 2]),
        (["no", "yes"], [2, 0]),
        (["yes", "maybe", "no", "one", "two"], [0, 1, 2, None, None]),
        (["2", "0", "1"], [2, 0, 1]),  # numbers of classes, as tables hold them
        (["0", "1"], [None, None]),  # too few to be sure of that
        (["cat", "dog", "owl"], [None] * 3),
        (None, [0, 1, 2]),
    ],
)
def test_every_class_keeps_the_weights_of_its_name(
    bert: Path, labels: list[str] | None, rows: list[int | None]
) -> None:
    stage = load_stage(str(bert), "sequence-classification", labels=labels)
    config = stage.model.config
    assert [config.id2label[row] for row in range(config.num_labels)] == (labels or KNOWN)
    assert stage.model.num_labels == stage.model.classifier.out_features == len(rows)
    trained = plain(bert).classifier
    for part in ("weight", "bias"):
        given, expected = getattr(stage.model.classifier, part), getattr(trained, part)
        for index, row in enumerate(rows):
            same = [torch.equal(given[index], expected[other]) for other in range(3)]
            assert same == [row == other for other in range(3)]
    assert stage.new == ({"classifier.weight", "classifier.bias"} if rows[0] is rows[1] is None else frozenset())


def test_classes_without_names_are_not_guessed_from_the_order_of_labels(bert: Path, tmp_path: Path) -> None:
    folder = named(save_tiny("bert", tmp_path), None)
    stage = load_stage(str(folder), "sequence-classification", labels=["a", "b", "c"])
    assert stage.new == {"classifier.weight", "classifier.bias"}
    stage = load_stage(str(folder), "sequence-classification", labels=["LABEL_2", "LABEL_0", "LABEL_1"])
    assert torch.equal(stage.model.classifier.weight, plain(folder).classifier.weight[[2, 0, 1]])


@pytest.mark.parametrize("arch", ["gpt2", "roberta", "distilbert", "vit"])
def test_heads_of_other_families(arch: str, tmp_path: Path) -> None:
    task = "image-classification" if arch == "vit" else "sequence-classification"
    folder = named(save_tiny(arch, tmp_path, task=task), KNOWN)  # type: ignore[arg-type]
    batch = {"pixel_values": torch.randn(2, 3, 12, 12)} if arch == "vit" else {"input_ids": IDS[:1]}
    stage = load_stage(str(folder), task, labels=["no", "oh", "yes", "maybe"])  # type: ignore[arg-type]
    with torch.no_grad():
        given, expected = stage.model.eval()(**batch).logits, plain(folder)(**batch).logits
    # A product with a matrix of another shape may round otherwise.
    torch.testing.assert_close(given[:, [2, 3, 0]], expected, rtol=1e-6, atol=1e-6)


def test_a_loop_of_ones_own_is_told_what_begins_anew(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = flexp.Server.from_pretrained(bert, "sequence-classification")
    with caplog.at_level(logging.WARNING, "flexp"):
        flexp.SplitModelForSequenceClassification.from_pretrained(
            bert, cut=(1, 3), link=server.connect("a"), labels=["no", "new", "yes"]
        )
    assert caplog.messages == ["the checkpoint's classifier keeps what it knows (no, yes); new in it: new"]
