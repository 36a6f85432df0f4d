"""Scores of a personal model on examples, and a classifier's predictions for a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexp.config import DataConfig
from flexp.data.columns import check_known, check_present, written_gaps
from flexp.data.scores import Scores, evaluate, unanswered
from flexp.data.sources import Rows, read_rows, split_for_tests
from flexp.data.tasks import task_of
from flexp.data.tasks.base import BaseTask
from flexp.data.types import Example, Task
from flexp.data.warnings import cut_note
from flexp.errors import ConfigError, ModelError
from flexp.export.trained import Trained
from flexp.files import check_new, replacing
from flexp.kinds import KINDS, logits_of, take_targets

WRITERS = (".csv", ".jsonl")


Say = Callable[[str], None]


def score(
    model: Trained,
    source: str | None = None,
    batch_size: int | None = None,
    *,
    pretrained: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Scores]:
    """The scores of a model by data set: those of its run, or ``source`` alone where a file is named.

    Args:
        pretrained: of the model as it was before training; only of a run.
        say: is told what the user should know of how ``source`` was read.

    Raises:
        ConfigError: there is nothing to score it on, or the model's beginning is not known.
        DataError: the file does not fit the task.
    """
    forward = model.pretrained if pretrained else model.forward
    sets = model.sets if source is None else {source: read_examples(source, model.config.data, model.task, say=say)[0]}
    if not sets:
        raise ConfigError(
            "an exported folder has no data of its own: say --data FILE, or --run RUN for that run's test data"
        )
    size = batch_size or model.config.evaluation.batch_size
    return {name: evaluate(forward, model.task, examples, size) for name, examples in sets.items()}


def predict(
    model: Trained,
    source: str,
    out: Path,
    batch_size: int | None = None,
    *,
    force: bool = False,
    say: Say = lambda _: None,
) -> int:
    """Write what the model answers to every row of ``source`` to ``out``, in their order; how many there were.

    A line of a ``.jsonl`` has ``row``, ``predicted`` and what else the task says of a row, such as ``probabilities`` by
    label. In a ``.csv`` these are columns of their own, and the parts of a list are divided by ``|``.

    Args:
        force: replace what stands at ``out``; never ``source``.
        say: is told what the user should know of how ``source`` was read.

    Raises:
        ConfigError: the task has no such answers, ``out`` has another ending or is taken, or a class is called as
            another column of a ``.csv``.
        DataError: the file does not fit the task.
        ModelError: the model does not answer some row with finite numbers; nothing is written.
        StorageError: ``out`` cannot be written; what stood there is untouched.
    """
    if not task_of(model.config.data).answers:
        raise ConfigError(f"flexp predict is for classifiers and such; this model is for {model.task.name}")
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(WRITERS)}")
    check_new(out, force=force, read=[source, source.partition("#")[0]])
    rows = _answers(model, source, batch_size or model.config.evaluation.batch_size, say)
    numbered = [{"row": number, **row} for number, row in enumerate(rows, start=1)]
    with replacing(out) as part, part.open("w", encoding="utf-8", newline="") as file:
        if out.suffix.lower() == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in numbered)
        else:
            flat = [_flat(row) for row in numbered]
            _check_columns([name for name, _ in flat[0]] if flat else [], out)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([name for name, _ in flat[0]] if flat else ["row", "predicted"])
            writer.writerows([value for _, value in row] for row in flat)
    return len(numbered)


def _check_columns(names: Sequence[str], out: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"--out {out}: two columns would be called {twice[0]!r}, one of them for a class; write a .jsonl, "
            "which has probabilities apart"
        )


def _flat(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One value a column: of a table of values one column each, of a list its parts in one."""
    found: list[tuple[str, Any]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += value.items()
        else:
            found.append((name, "|".join(map(str, value)) if isinstance(value, list) else value))
    return found


def _answers(model: Trained, source: str, size: int, say: Say) -> list[dict[str, Any]]:
    examples, _ = read_examples(source, model.config.data, model.task, labelled=False, say=say)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].get("input_ids", ())))
    found: dict[int, dict[str, Any]] = {}
    odd: set[Any] = set()  # rows: of one there may be several examples
    numbers = KINDS[model.task.model_kind].answers == "number"
    for start in range(0, len(order), size):
        chosen = order[start : start + size]  # of like length, so that there is little padding
        some = [examples[index] for index in chosen]
        batch = model.task.collate(some)
        take_targets(batch)
        with torch.no_grad():
            logits = logits_of(model.forward(batch))
        bad = unanswered(logits, batch, numbers)
        odd |= {examples[index].get("row", index) for index, one in zip(chosen, bad, strict=True) if one}
        found |= dict(zip(chosen, model.task.answer(logits, some), strict=True))
    if odd:
        rows = len({example.get("row", index) for index, example in enumerate(examples)})
        raise ModelError(
            f"{source}: the model of {model.client} answers {len(odd)} of {rows} rows with numbers that are not "
            "finite, so nothing is written; it diverged in training: lower train.personal.lr or train.shared.lr"
        )
    return list(model.task.by_row([found[index] for index in range(len(examples))]))


def read_examples(
    source: str, data: DataConfig, task: Task, *, labelled: bool = True, say: Say = lambda _: None
) -> tuple[list[Example], list[str]]:
    """All rows of ``source`` (what ``data.source`` may name) as examples, in their order, and the place of each. Of a
    folder with files for tests these are read.

    Args:
        labelled: whether what is right matters; without, no column of it is needed.
        say: is told what the user should know of how they were read.

    Raises:
        DataError: the file does not hold what the task needs, or a label that the model does not know.
    """
    rows = read_rows(source, split := split_for_tests(source), data.config)
    if split is not None:
        say(f"{source}: its files for tests are read ({source}#train: those for training)")
    kind = task_of(data)
    needed = kind.needed_columns(data)
    classes = task.label_names
    if not labelled and kind.answers:
        for column in kind.right_columns(data):
            needed.pop(column, None)
    for name, key in needed.items():
        rows.require(name, key)
    for line in rows.notes:
        say(line)
    for name in needed:
        values = rows.values(name)
        if name not in kind.gaps(data):
            check_present(values, name, rows.place)
        for line in written_gaps(values, name, rows.name):
            say(line)
    taken = rows.take(range(len(rows)), list(needed))
    if kind.labelled:
        labels = (
            _labels(rows, kind, data, classes) if data.label in needed else [kind.no_label(classes or [])] * len(rows)
        )
        for row, label in zip(taken, labels, strict=True):
            row[data.label] = label
    for index, row in enumerate(taken):
        image, folder = row.get(data.image), rows.part(index).folder
        if kind.images and isinstance(image, str) and folder is not None:
            row[data.image] = str(folder / Path(image))
    examples = task.encode(taken)
    for line in cut_note(rows.name, examples):
        say(line)
    return examples, [rows.place(index) for index in range(len(rows))]


def _labels(rows: Rows, task: type[BaseTask], data: DataConfig, classes: Sequence[str] | None) -> list[Any]:
    labels = task.read_labels(rows.values(data.label), rows.class_names(data.label), data, rows.place)
    if classes is not None:
        check_known({row: task.names_in(label) for row, label in enumerate(labels)}, classes, rows.place)
    return labels
