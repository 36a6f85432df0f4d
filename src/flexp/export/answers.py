"""Scores of a personal model on examples, and a classifier's predictions for a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flexp.data.scores import evaluate
from flexp.data.types import Forward
from flexp.errors import ConfigError
from flexp.export.rows import read_examples
from flexp.export.usable import Usable
from flexp.files import replacing

WRITERS = (".csv", ".jsonl")


def score(model: Usable, source: str | None = None, batch_size: int | None = None) -> dict[str, dict[str, float]]:
    """The scores of a model by data set: those of its run, or ``source`` alone where a file is named.

    Raises:
        ConfigError: there is nothing to score it on.
        DataError: the file does not fit the task.
    """
    return _score(model, model.forward, source, batch_size)


def score_pretrained(
    model: Usable, source: str | None = None, batch_size: int | None = None
) -> dict[str, dict[str, float]]:
    """The same for the model as it was before training; only of a run.

    Raises:
        ConfigError: the model is an exported one, to which its beginning is not known.
    """
    if model.pretrained is None:
        raise ConfigError("--pretrained needs the run: an exported folder does not hold the pretrained model")
    return _score(model, model.pretrained, source, batch_size)


def _score(model: Usable, forward: Forward, source: str | None, batch_size: int | None) -> dict[str, dict[str, float]]:
    sets = model.sets
    if source is not None:
        sets = {source: read_examples(source, model.data, model.task)[0]}
    if not sets:
        raise ConfigError(
            "an exported folder has no data of its own: say --data FILE, or --run RUN for that run's test data"
        )
    size = batch_size or model.batch_size
    return {name: evaluate(forward, model.task, examples, size) for name, examples in sets.items()}


def predict(model: Usable, source: str, out: Path, batch_size: int | None = None) -> int:
    """Write the label and the probabilities of every row of ``source`` to ``out``, in their order; how many there were.

    A row of a ``.csv`` has ``row``, ``predicted``, ``probability`` and one column for each label; a line of a
    ``.jsonl`` the same with the labels' probabilities in ``probabilities``.

    Raises:
        ConfigError: the model is no classifier, or ``out`` has another ending.
        DataError: the file does not fit the task.
        StorageError: ``out`` cannot be written; what stood there is untouched.
    """
    labels = model.task.label_names
    if labels is None:
        raise ConfigError(f"flexp predict is for classifiers; the task of this model is {model.task.name}")
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}")
    found = _probabilities(model, source, batch_size or model.batch_size)
    rows = [dict(zip(labels, values, strict=True)) for values in found]
    with replacing(out) as part, part.open("w", encoding="utf-8", newline="") as file:
        if out.suffix.lower() == ".jsonl":
            for number, row in enumerate(rows, start=1):
                file.write(json.dumps({**_chosen(number, row), "probabilities": row}, ensure_ascii=False) + "\n")
        else:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["row", "predicted", "probability", *labels])
            for number, row in enumerate(rows, start=1):
                writer.writerow([*_chosen(number, row).values(), *row.values()])
    return len(rows)


def _chosen(number: int, row: Mapping[str, float]) -> dict[str, Any]:
    label = max(row, key=row.__getitem__)
    return {"row": number, "predicted": label, "probability": row[label]}


def _probabilities(model: Usable, source: str, size: int) -> Iterator[list[float]]:
    examples, _ = read_examples(source, model.data, model.task, labelled=False)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].get("input_ids", ())))
    found: dict[int, list[float]] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]  # of like length, so that there is little padding
        batch = model.task.collate([examples[index] for index in chosen])
        del batch["labels"]
        with torch.no_grad():
            logits_BC = model.forward(batch).logits
        found |= dict(zip(chosen, torch.softmax(logits_BC.double(), dim=-1).tolist(), strict=True))
    return iter([found[index] for index in range(len(examples))])
