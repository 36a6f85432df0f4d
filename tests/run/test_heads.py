"""Regression, several labels and tags of words from a file to a personal model, by the public command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.files import read_json
from tests.data.tools import jsonl
from tests.tiny import bert_folder

CLIENTS = ("north", "south")
WORDS = ("red", "blue", "green", "dog", "cat", "bird", "fast", "now")


def rows(task: str) -> list[dict[str, Any]]:
    draw, found = np.random.default_rng(0), []
    for number in range(60):
        words = [str(word) for word in draw.choice(WORDS, 5)] + [f"w{number % 40}"]
        label: dict[str, Any] = {
            "regression": words.count("red") - 0.5 * words.count("dog"),
            "multi-label": [word for word in ("red", "dog") if word in words],
            "token-classification": ["B-X" if word == "red" else "I-X" if word == "dog" else "O" for word in words],
        }
        text = words if task == "token-classification" else " ".join(words)
        found.append({"text": text, "label": label[task], "client": CLIENTS[number % 2]})
    return found


def flexp(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def trained(folder: Path, task: str, more: str = "") -> tuple[Path, Path]:
    bert_folder(folder / "model")
    source = jsonl(folder / "rows.jsonl", rows(task))
    (folder / "run.toml").write_text(f"""
        threads = 1
        [model]
        id = "{folder / "model"}"
        [data]
        source = "{source}"
        task = "{task}"
        [data.clients]
        cut = [1, 3]
        [train]
        rounds = 1
        steps_per_round = 2
        {more}
        [train.personal]
        lr = 1e-3
        [evaluation]
        measure_memory = false
        [output]
        tensorboard = false
        html = false
    """)
    flexp("run", str(folder / "run.toml"), "--out", str(folder / "out"))
    return folder / "out", source


def of_regression(logits: torch.Tensor, row: dict[str, Any]) -> Any:
    assert row["predicted"] == pytest.approx(float(logits[0, 0]), abs=1e-5)


def of_labels(logits: torch.Tensor, row: dict[str, Any]) -> Any:
    chances = torch.sigmoid(logits[0]).tolist()
    assert list(row["probabilities"].values()) == pytest.approx(chances, abs=1e-5)
    assert row["predicted"] == [name for name, chance in zip(("dog", "red"), chances, strict=True) if chance >= 0.5]


def of_tags(logits: torch.Tensor, row: dict[str, Any]) -> Any:
    assert row["predicted"] == [("B-X", "I-X", "O")[tag] for tag in logits[0, 1:-1].argmax(-1).tolist()]


TASKS: dict[str, tuple[str, str, Callable[[torch.Tensor, dict[str, Any]], Any]]] = {
    "regression": ("rmse", "AutoModelForSequenceClassification", of_regression),
    "multi-label": ("micro_f1", "AutoModelForSequenceClassification", of_labels),
    "token-classification": ("f1", "AutoModelForTokenClassification", of_tags),
}


@pytest.mark.parametrize("task", TASKS)
def test_from_a_file_to_a_personal_model(tmp_path: Path, task: str) -> None:
    out, source = trained(tmp_path, task)
    metric, auto, check = TASKS[task]
    summary = read_json(out / "summary.json")
    assert (summary["metric"], summary["higher_is_better"]) == (metric, task != "regression")
    assert all(client["last"]["personal"] is not None for client in summary["clients"])
    found = json.loads(flexp("evaluate", str(out), "--client", "north", "--json"))
    last = next(client for client in summary["clients"] if client["name"] == "north")["last"]
    assert found["scores"]["personal"]["own test data"][metric] == pytest.approx(last["personal"])
    flexp("export", str(out), "--client", "north", "--out", str(tmp_path / "exported"))
    flexp("predict", str(tmp_path / "exported"), "--data", str(source), "--out", str(tmp_path / "answers.jsonl"))
    flexp("predict", str(out), "--client", "north", "--data", str(source), "--out", str(tmp_path / "answers.csv"))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len((tmp_path / "answers.csv").read_text().splitlines()) - 1 == 60
    plain = getattr(transformers, auto).from_pretrained(tmp_path / "exported").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    for row, answer in list(zip(rows(task), answers, strict=True))[:6]:
        text = row["text"] if isinstance(row["text"], str) else " ".join(row["text"])
        with torch.no_grad():
            check(plain(**tokens(text, return_tensors="pt")).logits, answer)
    if task == "regression":
        told = json.loads(flexp("evaluate", str(tmp_path / "exported"), "--data", str(source), "--json"))
        right, given = [row["label"] for row in rows(task)], [answer["predicted"] for answer in answers]
        (scores,) = told["scores"]["personal"].values()
        assert scores["rmse"] == pytest.approx(metrics.root_mean_squared_error(right, given), abs=1e-5)
        assert scores["r2"] == pytest.approx(metrics.r2_score(right, given), abs=1e-5)
