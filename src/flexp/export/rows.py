"""Examples from any file of a run's task, with or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexp.config import DataConfig
from flexp.data.columns import check_present, label_texts
from flexp.data.sources import Rows, read_rows
from flexp.data.tasks import LABELLED, needed_columns
from flexp.data.types import Example, Task
from flexp.errors import DataError


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
    needed = needed_columns(data)
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
    if data.task in LABELLED:
        labels = _labels(rows, data, classes) if data.label in needed else [(classes or [""])[0]] * len(rows)
        for row, label in zip(taken, labels, strict=True):
            row[data.label] = label
    for index, row in enumerate(taken):
        image, folder = row.get(data.image), rows.part(index).folder
        if data.task == "image-classification" and isinstance(image, str) and folder is not None:
            row[data.image] = str(folder / Path(image))
    return task.encode(taken), [rows.place(index) for index in range(len(rows))]


def _labels(rows: Rows, data: DataConfig, classes: Sequence[str] | None) -> list[str]:
    labels = label_texts(rows.values(data.label), rows.class_names(data.label), data.label, rows.place)
    for index, label in enumerate(labels):
        if classes is not None and label not in classes:
            raise DataError(
                f"{rows.place(index)}: the label {label[:40]!r} is none of those that the model knows: "
                + ", ".join(classes[:16])
            )
    return labels
