from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flexp.data.survey import survey
from flexp.run.draft import drafted, fitting, owners

from .tools import jsonl, labelled

LONG = "a text that says more than a label, number"


def table(**columns: Any) -> list[dict[str, Any]]:
    """Twelve rows; a value may depend on the row's number."""
    return [{name: made(k) if callable(made) else made for name, made in columns.items()} for k in range(12)]


@pytest.mark.parametrize(
    ("rows", "task", "keys", "owner"),
    [
        (table(body=lambda k: f"{LONG} {k}", team=lambda k: "ab"[k % 2], hospital=lambda k: "xyz"[k % 3]),
         "classification", {"text": "body", "label": "team"}, "hospital"),
        (table(question=lambda k: f"{LONG} {k}", response=lambda k: f"because {k}"),
         "instruction", {"prompt": "question", "answer": "response"}, "4"),
        (table(question=lambda k: f"{LONG} {k}", choices=lambda k: ["a", "b"], answer=lambda k: k % 2, user="me"),
         "multiple-choice", {"prompt": "question", "choices": "choices", "label": "answer"}, "4"),
        (table(prompt=LONG, conversations=lambda k: [{"from": "human", "value": f"{k}"}]),
         "instruction", {"messages": "conversations"}, "4"),
        (table(note=lambda k: f"{LONG} {k}", author=lambda k: "xy"[k % 2]), "causal-lm", {"text": "note"}, "author"),
        (table(text=lambda k: f"{LONG} {k}", tags=lambda k: [["a"], ["a", "b"], []][k % 3], kind=lambda k: "xy"[k % 2]),
         "multi-label", {"text": "text", "label": "tags"}, "4"),
        (table(context=lambda k: f"{LONG} {k}", question=lambda k: f"the {k} ?", answers=lambda k: {"text": [f"{k}"]}),
         "question-answering", {"text": "context", "prompt": "question", "answer": "answers"}, "4"),
        (table(text=lambda k: f"{LONG} {k}", score=lambda k: k / 4), "regression",
         {"text": "text", "label": "score"}, "4"),
        (table(tokens=lambda k: ["the", f"w{k}"], ner_tags=["O", "B-X"], text=lambda k: f"the w{k}"),
         "token-classification", {"text": "tokens", "label": "ner_tags"}, "4"),
    ],
    ids=["classes", "answers", "choices", "chats", "texts", "labels", "spans", "numbers", "words"],
)  # fmt: skip
def test_what_a_table_is_good_for(
    tmp_path: Path, rows: list[dict[str, Any]], task: str, keys: dict[str, Any], owner: str
) -> None:
    seen = survey(str(jsonl(tmp_path / "x.jsonl", rows)))
    best = fitting(seen.columns)[0]
    assert (best.task, best.keys, owners(seen)) == (task, keys, owner)


def test_files_and_folders_may_be_clients_but_not_those_of_splits(tmp_path: Path) -> None:
    for name in ("bern", "graz"):
        jsonl(tmp_path / "clients" / f"{name}.jsonl", labelled(8))
        for label in ("cat", "dog"):
            (tmp_path / "pets" / name / label).mkdir(parents=True)
            Image.new("RGB", (2, 2)).save(tmp_path / "pets" / name / label / "1.png")
    for name in ("train", "test"):
        jsonl(tmp_path / "splits" / f"{name}.jsonl", labelled(8))
    assert owners(survey(str(tmp_path / "clients"))) == "file"
    pets = survey(str(tmp_path / "pets"))
    assert (pets.rows, owners(pets), fitting(pets.columns)[0].task) == (4, "file", "image-classification")
    splits = survey(str(tmp_path / "splits"))
    assert (splits.rows, splits.files, splits.tests) == (8, [], True)
    made = drafted(splits, fitting(splits.columns)[0], "model", None, tmp_path / "x.toml")
    assert made["data"]["test_source"] == "splits#test"
    assert "test_fraction" not in made["data"]


def test_signs_between_labels_and_what_belongs_together(tmp_path: Path) -> None:
    rows = table(
        body=lambda k: f"{LONG} {k}", tags=lambda k: ["a|b", "b|c", "a"][k % 3], patient=lambda k: f"p{k // 2}"
    )
    seen = survey(str(jsonl(tmp_path / "x.jsonl", rows)))
    drafts = {draft.task: draft for draft in fitting(seen.columns)}
    assert drafts["multi-label"].keys == {"text": "body", "label": "tags", "label_separator": "|"}
    made = drafted(seen, drafts["multi-label"], "model", None, tmp_path / "x.toml")["data"]
    assert (made["label_separator"], made["group"]) == ("|", "patient")
    assert "group" not in drafted(seen, drafts["multi-label"], "model", "patient", tmp_path / "x.toml")["data"]
    # A patient of two clients: `data.group` would be refused, so it is not proposed.
    rows = [{**row, "client": "ab"[k % 2]} for k, row in enumerate(rows)]
    seen = survey(str(jsonl(tmp_path / "y.jsonl", rows)))
    for clients, found in ((None, False), ("4", True)):
        assert ("group" in drafted(seen, drafts["multi-label"], "model", clients, tmp_path / "y.toml")["data"]) is found


def test_columns_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b,c\n1,2.5,x\n2,3,\n1,2.5,x\n1,1,x\n")
    a, b, c = survey(str(tmp_path / "x.csv")).columns
    assert (a.kind, a.whole, a.distinct, a.common) == ("number", True, 2, [("1", 3), ("2", 1)])
    assert (b.kind, b.whole, c.kind, c.filled, c.distinct) == ("number", False, "text", 3, 1)
