"""The classes of a classifier: which they are, and which rows of a head that was trained already belong to them.

A head has a row for each class, in the order of its checkpoint. Whatever order the data's labels are in, a class keeps
the row of its name, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from flexp.data.columns import sort_labels
from flexp.errors import DataError

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
