from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import DataConfig
from flexp.data import load_federation
from flexp.data.scores import evaluate

from .tools import jsonl, labelled, tokenizer

TOK = tokenizer()


def warnings(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    config = DataConfig.model_validate({"source": str(jsonl(folder / "x.jsonl", rows)), **settings})
    return load_federation(config, TOK, 0, None).warnings


def rows(count: int = 200, **same: Any) -> list[dict[str, Any]]:
    """Distinct texts, two clients, two labels, enough to test on."""
    return [row | same for row in labelled(count)]


def test_sound_data_have_no_warnings(tmp_path: Path) -> None:
    assert warnings(tmp_path, rows()) == []


def test_a_text_that_is_trained_on_and_tested_is_counted_by_whose_it_is(tmp_path: Path) -> None:
    jsonl(tmp_path / "test.jsonl", [*rows()[:4], *rows(600)[400:480], {**rows()[0], "client": "south"}])
    found = warnings(tmp_path, rows(), test_source=str(tmp_path / "test.jsonl"))
    assert found[0].startswith("4 of 85 test and validation examples are also training examples of the same client "
                               "(north 2, south 2), so scores are too good")  # fmt: skip
    assert found[1].startswith("1 of 85 test and validation examples are also training examples of another client "
                               "(south 1)")  # fmt: skip
    assert len(found) == 2


def test_repeats_and_contradictions(tmp_path: Path) -> None:
    twice = [*rows(), {**rows()[0], "label": "yes"}, rows()[2]]
    found = warnings(tmp_path, twice, test_fraction=0.0)
    assert found == [
        "2 of 202 training examples repeat another of the same client (north 2)",
        "1 training inputs are there with more than one label: nobody can get all of them right",
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([r | {"label": r["label"] if r["client"] == "south" else "no"} for r in rows()],
         "client 'north' has training examples of one label only"),
        ([*rows(), {**rows(202)[201], "label": "rare"}], "there is one example only of the label 'rare'"),
        ([r | {"label": "Yes " if k % 3 else r["label"]} for k, r in enumerate(rows())],
         "the labels 'Yes' and 'yes' differ in spelling only"),
        ([r | {"label": f"case {k}"} for k, r in enumerate(rows())],
         "there are 200 labels for 200 examples, nearly one each: is data.label the right column?"),
        ([r | {"client": "North" if k % 4 else r["client"]} for k, r in enumerate(rows(400))],
         "the clients 'North' and 'north' differ in spelling only"),
        (rows(40), "fewer than 25 test examples (north 6, south 6): too few to tell anything"),
    ],
    ids=["one label", "one example", "spelling", "a class a row", "clients' spelling", "too few"],
)  # fmt: skip
def test_what_is_suspicious_is_one_line(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    assert [line for line in warnings(tmp_path, rows) if said in line.replace('"', "'")]


def test_many_clients_are_one_line(tmp_path: Path) -> None:
    names = tuple(f"c{k}" for k in range(10))
    (line,) = warnings(tmp_path, labelled(100, names))
    assert "(c0 3, c1 3, c2 3, c3 3, c4 3, c5 3 and 4 more)" in line


@pytest.mark.parametrize(("words", "said"), [(["red"], True), (["red", "blue"], False), ([], False)])
def test_several_labels_a_row(tmp_path: Path, words: list[str], said: bool) -> None:
    """With one label everywhere there is nothing to tell apart; with one that is sometimes there, there is."""
    made = [{**row, "label": ["red"] if row["client"] == "south" or k % 4 else words} for k, row in enumerate(rows())]
    made = [row if row["client"] == "north" else {**row, "label": [["red"], ["blue"]][k % 4 // 2]}
            for k, row in enumerate(made)]  # fmt: skip
    found = warnings(tmp_path, made, task="multi-label")
    assert [line for line in found if "of one label only" in line] == (
        ["client 'north' has training examples of one label only, and there is nothing to tell apart"] if said else []
    )


def test_labels_of_tests_alone_are_told(tmp_path: Path) -> None:
    """As ``1.0`` is, where a gap made numbers of a test file's labels."""
    train = [row | {"label": "01"[k // 2 % 2]} for k, row in enumerate(rows())]
    test = [row | {"label": ("0.0", "1.0")[k // 2 % 2]} for k, row in enumerate(rows(600)[400:])]
    jsonl(tmp_path / "test.jsonl", test)
    found = warnings(tmp_path, train, test_source=str(tmp_path / "test.jsonl"))
    assert found == [
        "200 of 200 test and validation examples have labels that no training example has: labels '0.0', '1.0'",
        "the labels '0' and '0.0' differ in spelling only: if they are one, make them one",
        "the labels '1' and '1.0' differ in spelling only: if they are one, make them one",
    ]


def test_groups_that_differ_in_spelling_are_told(tmp_path: Path) -> None:
    data = [row | {"patient": f"p{k % 40}" if k % 80 < 40 else f"P{k % 40}"} for k, row in enumerate(rows())]
    found = warnings(tmp_path, data, group="patient")
    assert found[0] == "the groups 'P0' and 'p0' differ in spelling only: if they are one, make them one"
    assert (len(found), found[-1]) == (7, "and 34 more groups differ in spelling only")


def test_what_exports_write_for_missing_is_told(tmp_path: Path) -> None:
    data = [row | ({"label": "NULL"} if k % 10 < 2 else {}) for k, row in enumerate(rows())]
    config = DataConfig.model_validate({"source": str(jsonl(tmp_path / "x.jsonl", data))})
    notes = load_federation(config, TOK, 0, None).notes
    assert any("column 'label' has 'NULL' in 40 rows, as exports write what is missing" in note for note in notes)
    plain = DataConfig.model_validate({"source": str(jsonl(tmp_path / "y.jsonl", rows()))})
    assert not any("missing" in note for note in load_federation(plain, TOK, 0, None).notes)


def test_clients_whose_tests_hold_no_entity_are_named(tmp_path: Path) -> None:
    """A model that rightly finds nothing there has no F1; with an error in every score it would be the worst client."""
    tags = {"north": "B-X O", "south": "O O", "west": "O O"}
    texts = [
        {"text": f"w{k % 40} w{k // 40}", "client": client, "label": tag if k % 4 else "B-X O"}
        for k in range(100)
        for client, tag in tags.items()
    ]
    jsonl(tmp_path / "test.jsonl", [row for row in texts if row["text"].startswith(("w1 ", "w2 ", "w3 "))])
    config = DataConfig.model_validate(
        {
            "source": str(jsonl(tmp_path / "x.jsonl", texts)),
            "test_source": str(tmp_path / "test.jsonl"),
            "task": "token-classification",
        }
    )
    found = load_federation(config, tokenizer(bert=True), 0, None)
    (line,) = [line for line in found.warnings if "no entity" in line]
    assert line.startswith(
        "the test examples of clients 'south', 'west' hold no entity: such a client has no f1, and is"
    )

    def right(batch: dict[str, Tensor]) -> Any:  # of a task whose model finds nothing
        names = found.task.label_names or []
        logits = torch.zeros(*batch["input_ids"].shape, len(names))
        logits[..., names.index("O")] = 9.0
        return SimpleNamespace(logits=logits)

    scores = [evaluate(right, found.task, client.test, 4, extras=False) for client in found.clients]
    assert [own["f1"] for own in scores] == [0.0, None, None]
    assert [own.get("undefined") for own in scores] == [None, ["f1"], ["f1"]]
    assert all(own["accuracy"] == 1.0 for own in scores[1:])
