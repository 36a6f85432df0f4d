"""The classes of a federation: one sorted list that all clients share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flexp.errors import DataError


def label_texts(values: Sequence[Any], names: list[str] | None, column: str, place: Callable[[int], str]) -> list[str]:
    """Every row's label as text. Strings and whole numbers are labels; ``names`` are those of a ``ClassLabel``.

    Raises:
        DataError: a value is something else; the message names its place.
    """
    if names is not None:
        return [
            names[value] if 0 <= value < len(names) else _refuse(value, column, place(i))
            for i, value in enumerate(values)
        ]
    return [_label(value, column, place, index) for index, value in enumerate(values)]


def sort_labels(texts: Iterable[str]) -> list[str]:
    """The distinct labels: by value when all are whole numbers, else by spelling."""
    distinct = set(texts)
    if all(text.lstrip("-").isdecimal() for text in distinct):
        return sorted(distinct, key=lambda text: (int(text), text))
    return sorted(distinct)


def _label(value: Any, column: str, place: Callable[[int], str], index: int) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _refuse(value, column, place(index))


def _refuse(value: Any, column: str, place: str) -> str:
    raise DataError(
        f"{place}: the label {str(value)[:40]!r} in column {column!r} is not a class; "
        "labels must be text or whole numbers (data.label names their column)"
    )
