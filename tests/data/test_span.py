"""Spans as answers: where they are among the tokens, long contexts, and SQuAD's scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.config import DataConfig
from flexp.data import load_federation
from flexp.data.scores import evaluate
from flexp.data.types import Federation, Tally
from flexp.errors import ConfigError, DataError

from .tools import jsonl, tokenizer

BERT = tokenizer(bert=True)
COLUMNS = {"text": "context", "prompt": "question", "answer": "answers"}
LONG = " ".join(f"w{k}" for k in range(30))


def row(answer: Any, context: str = "the red dog runs fast", question: str = "what runs ?") -> dict[str, Any]:
    return {"question": question, "context": context, "answers": answer, "client": "a"}


def made(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Federation:
    source = str(jsonl(folder / "rows.jsonl", rows))
    config = DataConfig.model_validate({"source": source, "task": "question-answering", **COLUMNS, **settings})
    return load_federation(config, BERT, 0, None)


def learnt(example: dict[str, Any]) -> str:
    return str(BERT.decode(example["input_ids"][example["start_positions"] : example["end_positions"] + 1]))


@pytest.mark.parametrize(
    "answer",
    [
        {"text": ["red dog", "dog"], "answer_start": [4, 8]},
        [{"text": "red dog", "answer_start": 4}],
        "red dog",
        ["red dog"],
    ],
)
def test_the_tokens_of_an_answer(tmp_path: Path, answer: Any) -> None:
    (client,) = made(tmp_path, [row(answer)] * 4).clients
    assert [learnt(example) for example in (*client.train, *client.test)] == ["red dog"] * 4
    assert client.train[0]["token_type_ids"][client.train[0]["start_positions"]] == 1


def test_a_long_context_is_read_in_windows_that_overlap(tmp_path: Path) -> None:
    found = made(tmp_path, [row("w20 w21", LONG, "what ?")] * 2, max_length=17, test_fraction=0.5)
    (client,) = found.clients
    words = [[int(e["context"][pair[0] + 1 : pair[1]]) for pair in e["offsets"] if pair] for e in client.train]
    assert words == [list(range(12)), list(range(8, 20)), list(range(16, 28)), list(range(24, 30))]
    assert [learnt(e) for e in client.train] == ["[CLS]", "[CLS]", "w20 w21", "[CLS]"]

    def model(batch: dict[str, torch.Tensor]) -> Any:
        """Knows where w9 and (less surely) w20 are."""
        ids = batch["input_ids"]
        sure = 2.0 * (ids == BERT.convert_tokens_to_ids("w9")) + 1.0 * (ids == BERT.convert_tokens_to_ids("w20"))
        ends = sure + 4.0 * (ids == BERT.convert_tokens_to_ids("w21"))
        return type("Output", (), {"start_logits": sure, "end_logits": ends})()

    scores = evaluate(model, found.task, client.test, 2)
    assert (scores["questions"], scores["f1"], scores["exact_match"]) == (1, 1.0, 1.0)  # 1 + 4 in one window
    assert scores["n"] == 4


def test_scores_are_means_over_questions_of_the_best_answer(tmp_path: Path) -> None:
    found = made(tmp_path, [row("dog")] * 2)
    given = ["dog runs", "w", "red dog"]
    answers = [{"row": f"{k}", "predicted": text, "score": 0.0, "none": 0.0} for k, text in enumerate(given)]
    right = [["red dog", "dog"], ["fast"], ["The red dog!"]]
    scores = found.task.figures(Tally(targets=right, answers=answers))
    assert scores == {"f1": pytest.approx((2 / 3 + 0 + 1) / 3), "exact_match": pytest.approx(1 / 3), "questions": 3}


def test_questions_without_an_answer(tmp_path: Path) -> None:
    rows = [row(["dog"]), row(None), row([]), row([])]
    with pytest.raises(DataError, match=r"rows.jsonl, line \d: the question has no answer.*data.unanswerable = true"):
        made(tmp_path, rows)
    found = made(tmp_path, rows, unanswerable=True, test_fraction=0.5)
    assert sorted(learnt(e) for c in found.clients for e in (*c.train, *c.test)) == ["[CLS]"] * 3 + ["dog"]
    sure = [{"row": "0", "predicted": "dog", "score": 1.0, "none": none} for none in (0.5, 3.0)]
    assert found.task.by_row(sure) == [{"predicted": "dog"}]  # one window of them has it
    assert found.task.by_row(sure[1:]) == [{"predicted": ""}]


@pytest.mark.parametrize(
    ("answer", "settings", "message"),
    [
        ("cat", {}, r"line 1: the answer 'cat' in column 'answers' is not in the context;"),
        ({"text": ["dog"], "answer_start": [3]}, {}, "is not in the context at character 3; write it as it stands"),
        ({"text": ["dog"], "answer_start": []}, {}, "1 answers and 0 places"),
        ({"texts": ["dog"]}, {"unanswerable": True}, "holds 'texts'; expected an answer's 'text'"),
        ([{"answer": "dog"}], {}, "holds 'answer'; expected an answer's 'text'"),
        ("dog", {"max_length": 9}, "the question has 6 tokens, so of the 9 of an example 3 are left"),
        ("dog", {"max_length": 9, "long_texts": "error"}, "the text has 11 tokens, more than the 9"),
    ],
)
def test_what_cannot_be_learnt_is_refused(tmp_path: Path, answer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(tmp_path, [row(answer)], test_fraction=0.0, **settings)
    with pytest.raises(ConfigError, match=r"data\.template is not for question-answering"):
        made(tmp_path, [row("dog")] * 2, template="{text}")
