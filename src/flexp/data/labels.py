"""The classes of a federation: one sorted list that all clients share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from flexp.errors import DataError

_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


def label_texts(values: Sequence[Any], names: list[str] | None, column: str, place: Callable[[int], str]) -> list[str]:
    """Every row's label as text. Text and whole numbers are labels as written; ``names`` are those of a ``ClassLabel``.

    Raises:
        DataError: a value is something else; the message names its place.
    """
    if names is not None:
        return [
            names[value] if 0 <= value < len(names) else _refuse(value, column, place(i))
            for i, value in enumerate(values)
        ]
    texts = [_label(value, column, place, index) for index, value in enumerate(values)]
    if all(_NUMBER.fullmatch(text) for text in texts):
        fraction = next((index for index, text in enumerate(texts) if not float(text).is_integer()), None)
        if fraction is not None:
            _refuse(texts[fraction], column, place(fraction))  # a measurement, not a class
    return texts


def sort_labels(texts: Iterable[str]) -> list[str]:
    """The distinct labels: by value when all are whole numbers, else by spelling."""
    distinct = set(texts)
    if all(text.lstrip("-").isdecimal() for text in distinct):
        return sorted(distinct, key=lambda text: (int(text), text))
    return sorted(distinct)


def _label(value: Any, column: str, place: Callable[[int], str], index: int) -> str:
    if isinstance(value, str):
        return value.strip()
    return _refuse(value, column, place(index))


def _refuse(value: Any, column: str, place: str) -> NoReturn:
    raise DataError(
        f"{place}: the label {str(value)[:40]!r} in column {column!r} is not a class; "
        "labels must be text or whole numbers (data.label names their column)"
    )
