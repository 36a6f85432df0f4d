"""Scores of a personal model on examples, and a classifier's predictions for a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexp.config import DataConfig
from flexp.data.columns import check_present, label_texts
from flexp.data.labels import check_known
from flexp.data.scores import evaluate
from flexp.data.sources import Rows, read_rows
from flexp.data.tasks import task_of
from flexp.data.types import Example, Task
from flexp.errors import ConfigError
from flexp.export.trained import Trained
from flexp.files import check_new, replacing

WRITERS = (".csv", ".jsonl")


def score(
    model: Trained, source: str | None = None, batch_size: int | None = None, *, pretrained: bool = False
) -> dict[str, dict[str, float]]:
    """The scores of a model by data set: those of its run, or ``source`` alone where a file is named.

    Args:
        pretrained: of the model as it was before training; only of a run.

    Raises:
        ConfigError: there is nothing to score it on, or the model's beginning is not known.
        DataError: the file does not fit the task.
    """
    forward = model.pretrained if pretrained else model.forward
    sets = model.sets if source is None else {source: read_examples(source, model.config.data, model.task)[0]}
    if not sets:
        raise ConfigError(
            "an exported folder has no data of its own: say --data FILE, or --run RUN for that run's test data"
        )
    size = batch_size or model.config.evaluation.batch_size
    return {name: evaluate(forward, model.task, examples, size) for name, examples in sets.items()}


def predict(model: Trained, source: str, out: Path, batch_size: int | None = None, *, force: bool = False) -> int:
    """Write the label and the probabilities of every row of ``source`` to ``out``, in their order; how many there were.

    A row of a ``.csv`` has ``row``, ``predicted``, ``probability`` and one column for each label; a line of a
    ``.jsonl`` the same with the labels' probabilities in ``probabilities``.

    Args:
        force: replace what stands at ``out``; never ``source``.

    Raises:
        ConfigError: the model is no classifier, or ``out`` has another ending or is taken.
        DataError: the file does not fit the task.
        StorageError: ``out`` cannot be written; what stood there is untouched.
    """
    labels = model.task.label_names
    if labels is None:
        raise ConfigError(f"flexp predict is for classifiers; the task of this model is {model.task.name}")
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}")
    check_new(out, force=force, read=[source, source.partition("#")[0]])
    found = _probabilities(model, source, batch_size or model.config.evaluation.batch_size)
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


def _probabilities(model: Trained, source: str, size: int) -> Iterator[list[float]]:
    examples, _ = read_examples(source, model.config.data, model.task, labelled=False)
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


def read_examples(
    source: str, data: DataConfig, task: Task, *, labelled: bool = True
) -> tuple[list[Example], list[str]]:
    """All rows of ``source`` (what ``data.source`` may name) as examples, in their order, and the place of each.

    Args:
        labelled: whether the labels matter; without, classifiers need no column of them, and examples have the first.

    Raises:
        DataError: the file does not hold what the task needs, or a label that the model does not know.
    """
    rows = read_rows(source, None, data.config)
    kind = task_of(data)
    needed = kind.needed_columns(data)
    classes = task.label_names
    if not labelled and classes is not None:
        needed.pop(data.label, None)
    for name, key in needed.items():
        rows.require(name, key)
    gaps = () if isinstance(data.choices, str) else data.choices
    for name in needed:
        if name not in gaps and name != data.image:
            check_present(rows.values(name), name, rows.place)
    taken = rows.take(range(len(rows)), list(needed))
    if kind.labelled:
        labels = _labels(rows, data, classes) if data.label in needed else [(classes or [""])[0]] * len(rows)
        for row, label in zip(taken, labels, strict=True):
            row[data.label] = label
    for index, row in enumerate(taken):
        image, folder = row.get(data.image), rows.part(index).folder
        if kind.images and isinstance(image, str) and folder is not None:
            row[data.image] = str(folder / Path(image))
    return task.encode(taken), [rows.place(index) for index in range(len(rows))]


def _labels(rows: Rows, data: DataConfig, classes: Sequence[str] | None) -> list[str]:
    labels = label_texts(rows.values(data.label), rows.class_names(data.label), data.label, rows.place)
    if classes is not None:
        check_known(dict(enumerate(labels)), classes, rows.place)
    return labels
