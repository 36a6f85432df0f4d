"""A file's rows as one table, and values as one writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexp.errors import DataError


@dataclass(frozen=True)
class Table:
    """The rows of a file; row i is ``unit`` number ``numbers[i]`` (i + 1 when None)."""

    data: pa.Table
    unit: str = "row"
    numbers: Sequence[int] | None = None
    note: str | None = None  # what had to be guessed about the file, for the user


def written(value: Any) -> Any:
    """A value of a typed column as one would write it; lists and bytes keep their kind, None stays None.

    Whole numbers have no fraction (7.0 is ``7``: that is how pandas stores whole numbers beside gaps).
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return None if value != value else str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, list):
        return [written(item) for item in value]
    return value if value is None or isinstance(value, str | bytes | dict) else str(value)


def unlike(path: Path, names: Iterable[str]) -> None:
    """Refuse a table that has two columns of one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: has more than one column {twice[0]!r}; give each a name of its own")
