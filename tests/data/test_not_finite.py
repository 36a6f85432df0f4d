"""A model whose numbers are not finite has no score, in every task; one that takes something for impossible has."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import DataConfig
from flexp.data import load_federation
from flexp.data.scores import evaluate, unanswered
from flexp.data.tasks import limit_of, make_task

from .tools import jsonl, tokenizer

BERT, TOK = tokenizer(bert=True), tokenizer()
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "classification": ({}, [{"text": f"w{k}", "label": ("no", "yes")[k % 2]} for k in range(8)]),
    "multi-label": ({}, [{"text": f"w{k}", "label": [["red"], ["dog"]][k % 2]} for k in range(8)]),
    "regression": ({}, [{"text": f"w{k}", "label": float(k)} for k in range(8)]),
    "token-classification": ({}, [{"text": ["w1", f"w{k}"], "label": ["O", "B-LOC"]} for k in range(8)]),
    "question-answering": (
        {"text": "context", "prompt": "question", "answer": "answers"},
        [{"question": "what ?", "context": f"the red w{k}", "answers": "red"} for k in range(8)],
    ),
    "causal-lm": ({}, [{"text": f"the w{k} dog"} for k in range(8)]),
    "instruction": ({}, [{"prompt": "what ?", "answer": f"w{k}"} for k in range(8)]),
    "multiple-choice": (
        {},
        [{"prompt": f"w{k}", "choices": ["dog", "cat"], "label": "AB"[k % 2]} for k in range(8)],
    ),
}
SCORES = {
    "classification": {"loss", "accuracy", "macro_f1", "auc"},
    "multi-label": {"loss", "micro_f1", "macro_f1", "exact_match", "auc"},
    "regression": {"loss", "rmse", "mae", "r2", "pearson"},
    "token-classification": {"loss", "accuracy", "macro_f1", "auc", "f1", "precision", "recall"},
    "question-answering": {"loss", "f1", "exact_match"},
    "causal-lm": {"loss", "perplexity"},
    "instruction": {"loss", "perplexity", "exact_match"},
    "multiple-choice": {"loss", "accuracy"},
}


def made(folder: Path, name: str) -> tuple[Any, list[dict[str, Any]]]:
    settings, rows = ROWS[name]
    source = str(jsonl(folder / "rows.jsonl", [{**row, "client": "a"} for row in rows]))
    config = DataConfig.model_validate({"source": source, "task": name, "test_fraction": 0.5, **settings})
    lm = name in ("causal-lm", "instruction", "multiple-choice")
    found = load_federation(config, TOK if lm else BERT, 0, None)
    return found.task, found.clients[0].test


def answering(task: Any, spoil: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    """A model of random logits, the same for equal shapes, of which ``spoil`` gives others."""
    outputs = {"regression": 1, "question-answering": 2}.get(task.name, len(task.label_names or ()) or len(TOK))

    def forward(batch: dict[str, Tensor]) -> Any:
        shape = batch["input_ids"].shape
        by_token = task.name in ("token-classification", "question-answering") or task.label_names is None
        places = shape if by_token and task.name != "regression" else shape[:1]
        logits = spoil(torch.randn(*places, outputs, generator=torch.Generator().manual_seed(0)))
        if task.name == "question-answering":
            return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])
        return SimpleNamespace(logits=logits)

    return forward


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    """The first example of each batch alone."""

    def spoil(logits: Tensor) -> Tensor:
        logits[0] = value
        return logits

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ROWS)
def test_one_answer_that_is_not_finite_leaves_no_score(tmp_path: Path, name: str, value: float) -> None:
    task, examples = made(tmp_path, name)
    whole = evaluate(answering(task, lambda logits: logits), task, examples, len(examples))
    assert "not_finite" not in whole
    assert all(isinstance(whole[key], float) for key in SCORES[name])
    found = evaluate(answering(task, spoilt(value)), task, examples, len(examples))
    assert {key for key, score in found.items() if score is None} == SCORES[name]
    facts = {key: score for key, score in whole.items() if key in ("n", "majority", "tokens", "questions")}
    assert {key: score for key, score in found.items() if score is not None} == {**facts, "not_finite": 1}


def test_minus_infinity_is_an_answer_and_so_is_an_infinite_loss(tmp_path: Path) -> None:
    """Of a vocabulary that is masked: what cannot be has no say, and where it is right the loss alone is infinite."""
    task, examples = made(tmp_path, "classification")

    def never(label: int) -> Callable[[Tensor], Tensor]:
        return lambda logits: logits.index_fill(-1, torch.tensor([label]), -math.inf)

    found = evaluate(answering(task, never(0)), task, examples, 2)
    wrong = sum(example["labels"] == 0 for example in examples)
    assert (found["loss"], found["impossible"]) == (math.inf, wrong)
    assert found["accuracy"] == 1 - wrong / len(examples)
    assert "not_finite" not in found


def test_a_loss_that_is_large_is_no_divergence(tmp_path: Path) -> None:
    task, examples = made(tmp_path, "causal-lm")
    found = evaluate(answering(task, lambda logits: 2000.0 * logits), task, examples, 2)
    assert 1000 < found["loss"] < 1e5
    assert found["perplexity"] == math.inf
    assert not found.keys() & {"not_finite", "impossible"}


def test_what_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    """Behind padding on the left some models have nothing to attend to, and give NaN."""
    padded = tokenizer(padding_side="left")
    config = DataConfig.model_validate({"source": "-", "task": "causal-lm"})
    task = make_task(config, padded, limit_of(config, None), [])
    examples = task.encode([{"text": "the red dog"}, {"text": "the red dog runs fast now"}])
    model = answering(task, lambda logits: logits)

    def forward(batch: dict[str, Tensor]) -> Any:
        logits = model(batch).logits
        logits[batch["attention_mask"] == 0] = math.nan
        return SimpleNamespace(logits=logits)

    assert math.isfinite(evaluate(forward, task, examples, 2)["loss"])


def test_choices_of_a_model_that_breaks_on_them_alone(tmp_path: Path) -> None:
    """The cloze score asks anew; what it finds is true of the model."""
    task, examples = made(tmp_path, "multiple-choice")
    asked = {len(example["input_ids"]) for example in examples}
    model = answering(task, lambda logits: logits)

    def forward(batch: dict[str, Tensor]) -> Any:
        logits = model(batch).logits
        return SimpleNamespace(logits=logits if batch["input_ids"].shape[1] in asked else logits * math.nan)

    found = evaluate(forward, task, examples, 8)
    assert (found["accuracy"], found["cloze_accuracy"], found["loss"]) == (None, None, None)


def test_which_examples_have_no_answer() -> None:
    logits = torch.zeros(4, 3, 2)
    logits[0, 0, 0], logits[1, 2, 1], logits[2, 1, 1], logits[3] = math.nan, math.nan, math.inf, -math.inf
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])  # of the second it is padding
    assert unanswered(logits, {"attention_mask": mask}) == [True, False, True, False]
    assert unanswered(torch.tensor([[1.0], [-math.inf]]), {"attention_mask": mask[:2]}, numbers=True) == [False, True]
