"""What a row's label may be besides one class: a number, several classes, a tag for each word."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from flexp.config import DataConfig
from flexp.data import load_federation
from flexp.data.tasks import task_of
from flexp.data.types import Tally
from flexp.errors import ConfigError, DataError

from .tools import jsonl, tokenizer

BERT = tokenizer(bert=True)


def made(source: Path, task: str, **settings: Any) -> Any:
    config = DataConfig.model_validate({"source": str(source), "task": task, **settings})
    return load_federation(config, BERT, 0, None)


def test_several_labels_as_lists_or_text(tmp_path: Path) -> None:
    labels = [["red", "dog"], [], ["dog"], ["red"]]
    rows = [{"text": f"w{k}", "label": labels[k % 4], "client": "a"} for k in range(40)]
    found = made(jsonl(tmp_path / "rows.jsonl", rows), "multi-label")
    written = [f"w{k},{'|'.join(labels[k % 4])},a" for k in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label,client", *written]) + "\n")
    assert made(tmp_path / "rows.csv", "multi-label", label_separator="|").clients == found.clients
    kinds = pa.list_(pa.string())
    table = pa.table({**{k: [r[k] for r in rows] for k in ("text", "client")}, "label": pa.array(
        [r["label"] for r in rows], kinds)})  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert made(tmp_path / "rows.parquet", "multi-label").clients == found.clients
    assert found.task.label_names == ["dog", "red"]
    batch = found.task.collate(found.clients[0].train[:3])
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].shape == (3, 2)
    with pytest.raises(DataError, match=r"rows.csv, row 1: .*say with data.label_separator what divides its labels"):
        made(tmp_path / "rows.csv", "multi-label")


def test_rare_labels_are_on_both_sides(tmp_path: Path) -> None:
    rows = [{"text": f"w{k}", "label": ["dog", *(["red"] if k < 4 else [])], "client": "a"} for k in range(40)]
    (client,) = made(jsonl(tmp_path / "rows.jsonl", rows), "multi-label", test_fraction=0.25).clients
    assert [sum(e["labels"][1] for e in side) for side in (client.train, client.test)] == [3, 1]


def test_numbers_are_split_alike_and_must_be_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"w{k}", "label": k / 2, "client": "a"} for k in range(40)]
    (client,) = made(jsonl(tmp_path / "rows.jsonl", rows), "regression", test_fraction=0.25).clients
    tenths = Counter(int(example["labels"] // 2) for example in client.test)
    assert set(tenths.values()) == {1}
    large = jsonl(tmp_path / "large.jsonl", [*rows, {"text": "x", "label": 1.7976931348623157e308, "client": "a"}])
    with pytest.raises(DataError, match=r"large.jsonl, line 41: .* is too large for float32"):
        made(large, "regression")
    for wrong in ("many", "nan", "1,5"):
        bad = jsonl(tmp_path / "bad.jsonl", [{**row, "label": str(row["label"])} for row in rows[:3]] + [
            {"text": "x", "label": wrong, "client": "a"}
        ])  # fmt: skip
        with pytest.raises(DataError, match=r"bad.jsonl, line 4: .* is no number"):
            made(bad, "regression")


def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    rows = [{"text": ["dog.", "red", "cat"], "label": ["B-X", "O", "I-X"], "client": "a"}] * 6
    found = made(jsonl(tmp_path / "rows.jsonl", rows), "token-classification")
    example = found.clients[0].train[0]
    assert BERT.convert_ids_to_tokens(example["input_ids"]) == ["[CLS]", "dog", ".", "red", "cat", "[SEP]"]
    names = found.task.label_names
    assert names == ["B-X", "I-X", "O"]
    assert [names[tag] if tag >= 0 else None for tag in example["labels"]] == [None, "B-X", None, "O", "I-X", None]
    text = [{**row, "text": "dog. red cat", "label": "B-X O I-X"} for row in rows]
    assert made(jsonl(tmp_path / "text.jsonl", text), "token-classification").clients == found.clients
    cut = made(tmp_path / "rows.jsonl", "token-classification", max_length=4)
    assert (cut.clients[0].train[0]["cut"], cut.clients[0].train[0]["words"]) == (2, 3)
    short = jsonl(tmp_path / "short.jsonl", [{**rows[0], "label": ["O"]}] * 2 + rows)
    with pytest.raises(DataError, match=r"short.jsonl, line \d: 3 words in column 'text' and 1 tags in column 'label'"):
        made(short, "token-classification")
    slow = PreTrainedTokenizerFast(tokenizer_object=BERT.backend_tokenizer)
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(ConfigError, match="needs a fast tokenizer"):
        task_of(found.task.config)(found.task.config, slow, found.task.limit, names)


@pytest.mark.parametrize(
    ("outside", "said"), [("O", None), ("_", "outside of entities, like O: _"), ("OTHER", "OTHER")]
)
def test_no_entity_found_is_no_hit(tmp_path: Path, outside: str, said: str | None) -> None:
    """However what is outside is written: where ``_`` was an entity, whoever found none had an F1 of a half."""
    rows = [{"text": ["dog", "red"], "label": ["B-X" if k % 3 else outside, outside], "client": "a"} for k in range(90)]
    found = made(jsonl(tmp_path / "rows.jsonl", rows), "token-classification")
    tag = found.task.label_names.index(outside)
    logits = torch.zeros(1, 4, 2)
    logits[..., tag] = 5.0
    tests = found.clients[0].test
    tally = Tally()
    for example in tests:
        tally.extend(found.task.measure(logits, torch.tensor([example["labels"]]), [example]))
    assert found.task.figures(tally)["f1"] == 0.0
    doubts = [line for line in found.warnings if "prefix" in line]
    assert len(doubts) == (said is not None) and (said is None or said in doubts[0])  # noqa: PT018


def test_tags_that_are_nearly_those_of_entities_are_told(tmp_path: Path) -> None:
    rows = [{"text": [f"w{k % 40}", "red"], "label": ["b-per", "o"], "client": "a"} for k in range(90)]
    found = made(jsonl(tmp_path / "rows.jsonl", rows), "token-classification")
    assert found.task.metric == "accuracy"
    assert any("'b-per' are taken as classes of words" in line for line in found.warnings)


def test_a_word_without_a_token_has_no_tag_and_moves_none(tmp_path: Path) -> None:
    """A lone mark of direction, as telephones write it."""
    words = ["dog", "\u200e", "red", "cat"]
    quiet = tokenizer(bert=True)
    quiet.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    rows = [{"text": words, "label": ["A", "A", "B", "C"], "client": "a"}] * 6
    source = jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig.model_validate({"source": str(source), "task": "token-classification"})
    task = load_federation(config, quiet, 0, None).task
    (example,) = task.encode([{"text": words, "label": ["A", "A", "B", "C"]}])
    logits = torch.eye(3)[torch.tensor([[0, 0, 1, 2, 0]])]
    assert task.answer(logits, [example]) == [{"predicted": ["A", "", "B", "C"]}]


@pytest.mark.parametrize(
    ("task", "label", "settings", "message"),
    [
        ("multi-label", [0, 1, 0], {}, "holds 0, 1, 0, of as many parts in every row: whether each label is there"),
        ("multi-label", "['red', 'dog']", {"label_separator": ","}, "holds lists written as text .*Parquet"),
        ("token-classification", "['A', 'B']", {}, "holds lists written as text"),
        ("classification", "['red']", {}, "holds lists written as text"),
    ],
)
def test_labels_in_a_form_that_would_make_other_classes_are_refused(
    tmp_path: Path, task: str, label: Any, settings: dict[str, Any], message: str
) -> None:
    rows = [{"text": "red dog", "label": label, "client": "a"}] * 4
    with pytest.raises(DataError, match=message):
        made(jsonl(tmp_path / "rows.jsonl", rows), task, **settings)
