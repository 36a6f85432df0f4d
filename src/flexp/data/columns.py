"""Looking up columns and labels and checking their values, with messages that help; and the classes of a classifier:
which they are, and which rows of a head that was trained already belong to them.

A head has a row for each class, in the order of its checkpoint. Whatever order the data's labels are in, a class keeps
the row of its name, or none.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from flexp.errors import DataError


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for a likely typing error, else an empty string."""
    known = list(known)
    lowered = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def require(name: str, key: str, columns: Sequence[str], source: str) -> None:
    """Check that the column ``name``, which the configuration's ``key`` names, exists.

    Raises:
        DataError: it does not; the message lists the columns and the nearest name.
    """
    if name in columns:
        return
    hint = nearest(name, columns)
    if not hint:
        hint = f"; set {key} to one of them"
        if source.endswith((".csv", ".tsv")):
            hint += " (the first line of the file must name the columns)"
    listed = ", ".join(repr(str(column)[:40]) for column in columns[:16]) + (" ..." if len(columns) > 16 else "")
    raise DataError(f"{source}: there is no column {name!r} ({key}); the columns are {listed}{hint}")


def missing(value: Any) -> bool:
    """Whether ``value`` is nothing: None, NaN, blank text, or an empty list."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, list | tuple) and (len(value) == 0 or any(missing(item) for item in value))


GAPS = frozenset(("NULL", "null", "NaN", "nan", "NA", "N/A", "#N/A", "<NA>", "None"))
"""How programs write what is missing. In a table of text it may as well be a word, so it stays one."""


def written_gaps(values: Sequence[Any], column: str, source: str) -> list[str]:
    """A line where texts of ``column`` are such as :data:`GAPS`."""
    found = Counter(text for value in values if isinstance(value, str) and (text := value.strip()) in GAPS)
    if not found:
        return []
    what, rows = ", ".join(map(repr, found)), f"{found.total()} row{'s' if found.total() > 1 else ''}"
    return [
        f"{source}: column {column!r} has {what} in {rows}, as exports write what is missing; they are taken as they "
        "stand: leave such cells empty, or remove the rows"
    ]


def check_present(values: Sequence[Any], column: str, place: Callable[[int], str]) -> None:
    """Check that every row has a value in ``column``.

    Raises:
        DataError: some have none; the message names the first and counts the others.
    """
    bad = [index for index, value in enumerate(values) if missing(value)]
    if bad:
        more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
        raise DataError(f"{place(bad[0])}: the column {column!r} is empty{more}; fill it in or remove the row")


def as_text(value: Any, column: str, place: str) -> str:
    """``value`` as text; numbers are written out.

    Raises:
        DataError: it is neither text nor a number.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(
        f"{place}: the column {column!r} holds a {type(value).__name__}, but text was expected; "
        "name another column or convert it"
    )


def check_no_list(values: Sequence[Any], column: str, place: Callable[[int], str]) -> None:
    """Refuse a column of texts that programs write where a cell cannot hold a list: ``['x', 'y']``.

    Raises:
        DataError: most of its texts are such.
    """
    texts = [(index, value.strip()) for index, value in enumerate(values) if isinstance(value, str) and value.strip()]
    lists = [index for index, text in texts if text[0] == "[" and text[-1] == "]"]
    if lists and 2 * len(lists) > len(texts):
        raise DataError(
            f"{place(lists[0])}: the column {column!r} holds lists written as text ({str(values[lists[0]])[:40]}); "
            "save it as JSON Lines or Parquet, which keep lists, or write the parts with a sign between them"
        )


def lists_of_labels(
    values: Sequence[Any], names: list[str] | None, column: str, separator: str | None, place: Callable[[int], str]
) -> list[list[str]]:
    """Every row's labels: a list of texts, or of numbers of ``names``; or text that ``separator`` (``None``: space)
    divides. A row with nothing has none.

    Raises:
        DataError: a value is something else; the message names its place.
    """
    check_no_list(values, column, place)
    found = []
    for index, value in enumerate(values):
        if isinstance(value, str):
            value = value.split(separator)
        elif value is None:
            value = []
        elif not isinstance(value, list):
            _refuse(value, column, place(index))
        if names is not None:
            value = [_named(one, names) or _refuse(one, column, place(index)) for one in value]
        stripped = [one.strip() if isinstance(one, str) else _refuse(one, column, place(index)) for one in value]
        found.append([one for one in stripped if one])
    return found


NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
_WHOLE = re.compile(r"-?\d+")


def label_texts(values: Sequence[Any], names: list[str] | None, column: str, place: Callable[[int], str]) -> list[str]:
    """Every row's label as text. Text and whole numbers are labels as written; ``names`` are those of a ``ClassLabel``.

    Raises:
        DataError: a value is something else; the message names its place.
    """
    if names is not None:
        return [_named(value, names) or _refuse(value, column, place(index)) for index, value in enumerate(values)]
    check_no_list(values, column, place)
    texts = [_label(value, column, place, index) for index, value in enumerate(values)]
    if all(NUMBER.fullmatch(text) for text in texts):
        fraction = next((index for index, text in enumerate(texts) if not float(text).is_integer()), None)
        if fraction is not None:
            _refuse(texts[fraction], column, place(fraction))  # a measurement, not a class
    return texts


def sort_labels(texts: Iterable[str]) -> list[str]:
    """The distinct labels: by value when all are whole numbers, else by spelling."""
    distinct = set(texts)
    if all(_WHOLE.fullmatch(text) for text in distinct):
        return sorted(distinct, key=lambda text: (int(text), text))
    return sorted(distinct)


def _named(number: Any, names: Sequence[str]) -> str | None:
    """The name of a ``ClassLabel``'s number; ``None``: it has none."""
    return names[number] if isinstance(number, int) and 0 <= number < len(names) else None


def _label(value: Any, column: str, place: Callable[[int], str], index: int) -> str:
    if isinstance(value, str):
        return value.strip()
    return _refuse(value, column, place(index))


def _refuse(value: Any, column: str, place: str) -> NoReturn:
    raise DataError(
        f"{place}: the label {str(value)[:40]!r} in column {column!r} is not a class; "
        "labels must be text or whole numbers (data.label names their column)"
    )


_LISTED = 16


def rows_of(head: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    """For every label the row of ``head``, the names of a trained head's classes, that is its; None: it has none.

    By name; or by number where no name is a label, and the labels are just the numbers 0 … n − 1 of the n classes.
    """
    named = {name: row for row, name in enumerate(head)}
    if not named.keys() & set(labels) and set(labels) == {str(row) for row in range(len(head))}:
        return [int(label) for label in labels]
    return [named.get(label) for label in labels]


def settled(labels: Sequence[str], head: Sequence[str]) -> tuple[list[str], list[str]]:
    """The classes for data with ``labels``, in their final order, and what the user should know of it.

    A head that knows some of the labels stays whole, and new ones come after its own.
    """
    rows = rows_of(head, labels)
    known = [row for row in rows if row is not None]
    numbers = len(known) == len(labels) and labels[0] not in head
    new = [label for label, row in zip(labels, rows, strict=True) if row is None]
    if not known:
        names = list(labels)
    elif numbers:
        names = [label for _, label in sorted(zip(known, labels, strict=True))]
    else:
        names = [*head, *new]
    return names, remarks(head, names, labels)


def remarks(head: Sequence[str], names: Sequence[str], labels: Collection[str] = ()) -> list[str]:
    """What the user should know where a model with the classes ``names`` takes over from a trained head.

    Args:
        labels: those in the data, if that is known.
    """
    if not head or not names:
        return []
    rows = rows_of(head, names)
    new = [name for name, row in zip(names, rows, strict=True) if row is None]
    if len(new) == len(names):
        return [
            f"the checkpoint's classifier knows {_listed(head)}, and not {_listed(names)}: it begins anew (to keep it, "
            "name its classes like the labels in id2label of its config.json)"
        ]
    if names[0] not in head and not new:
        pairs = [f"{name} = {head[row]}" for name, row in zip(names, rows, strict=True) if row is not None]
        return [f"labels are taken for the numbers of the checkpoint's classes: {_listed(pairs)}"]
    found = []
    if new:
        found.append(
            f"the checkpoint's classifier keeps what it knows ({_listed([n for n in names if n not in new])}); new in "
            f"it: {_listed(new)}"
        )
    unused = [name for name in names if labels and name not in labels]
    if unused:
        found.append(f"the checkpoint's classifier knows classes that the data do not have: {_listed(unused)}")
    return found


def classes_of(
    found: Collection[str], given: list[str] | None, head: Sequence[str], source: str, column: str
) -> list[str]:
    """The labels of all clients' data: those of a ``ClassLabel`` in its order, else sorted.

    Args:
        found: in the data. given: the names of a ``ClassLabel``.
        head: the classes of a trained head, which may know more than the data have.

    Raises:
        DataError: there is one only.
    """
    if given is not None and set(found) <= set(given):
        return given
    if len(found) < 2 and not set(found) <= set(head):
        raise DataError(
            f"{source}: the clients have one label only ({', '.join(found)}) in column {column!r}; "
            "a classifier needs two at least: check data.label"
        )
    return sort_labels(found)


def check_known(labels: Mapping[int, Collection[str]], known: Sequence[str], place: Callable[[int], str]) -> None:
    """Check that a model whose classes are ``known`` knows the labels of every row, by its number.

    Raises:
        DataError: one is none of its classes.
    """
    classes = set(known)
    for row, label in ((row, name) for row, names in labels.items() for name in names):
        if label not in classes:
            raise DataError(
                f"{place(row)}: the label {label[:40]!r} is none of those that the model knows: {_listed(known)}"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:_LISTED]) + (" ..." if len(names) > _LISTED else "")
