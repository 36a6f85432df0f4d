"""What a source holds, column by column, before anybody has said what it is for: what ``flexp init`` looks at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from flexp.data.columns import missing
from flexp.data.readers import IMAGES
from flexp.data.sources import Rows, read_rows, splits_of
from flexp.errors import DataError

Kind = Literal["text", "number", "list", "chat", "image", "other"]
TEXTS = ("text", "sentence", "review", "content", "body", "comment", "message", "utterance", "snippet", "document")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "verdict", "rating", "topic", "intent", "y")
CLIENTS = (
    "client", "site", "hospital", "clinic", "institution", "office", "organisation", "organization", "owner", "user",
    "user_id", "author", "device", "region", "branch", "department", "house", "shop", "store", "speaker", "domain",
)  # fmt: skip
GROUPS = (
    "group", "patient", "patient_id", "subject", "subject_id", "document", "document_id", "doc_id", "conversation_id",
    "thread_id", "session_id", "case_id", "passage_id",
)  # fmt: skip
"""Names by which such a column is known at sight."""

_NUMBER = re.compile(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?", re.IGNORECASE)
_COMMON = 64
_ENOUGH = 500
"""Values that show of which kind a column is."""


@dataclass(frozen=True)
class Column:
    """A column of a source.

    Attributes:
        kind: ``number``: all values are; ``chat``: lists of messages; ``image``: files or bytes of images.
        filled: rows that have a value.
        distinct: different values, or different items of a list; 0 of a kind that is not counted.
        length: characters of the mean value.
        long: characters that 19 of 20 values have at most.
        common: the most frequent values, and how often they are there.
        whole: of a ``number``: all are whole.
        torn: of a column that may be a group: columns that differ between rows that share its value.
    """

    name: str
    kind: Kind
    filled: int
    distinct: int = 0
    length: float = 0.0
    long: int = 0
    common: Sequence[tuple[str, int]] = ()
    whole: bool = True
    torn: frozenset[str] = frozenset()

    @property
    def repeats(self) -> bool:
        """Whether values come again and again, as those of labels and owners do."""
        return 2 <= self.distinct <= max(2, self.filled // 3)


@dataclass(frozen=True)
class Survey:
    """A source: how many rows, of which columns, in which files of which clients, with test data or without."""

    source: str
    rows: int
    columns: Sequence[Column]
    files: Sequence[str] = ()  # clients, if every file or folder is one
    tests: bool = False  # there are files for testing beside those for training
    notes: Sequence[str] = field(default=())

    def group(self) -> Column | None:
        """The column whose equal values belong together (a patient, a document), if one is known by its name."""
        found = [column for column in _named(self.columns, GROUPS) if column.kind in ("text", "number")]
        client = self.client()
        return next((one for one in found if one != client and 1 < one.distinct < one.filled), None)

    def client(self) -> Column | None:
        """The column that names owners, if one is known by its name."""
        return next(
            (column for column in _named(self.columns, CLIENTS) if column.repeats and column.kind != "list"), None
        )


def survey(source: str, split: str | None = None, config: str | None = None) -> Survey:
    """Look at all rows of ``source`` (:func:`flexp.data.sources.read_rows` says what it may be).

    Raises:
        FlexpError: nothing readable is there.
    """
    splits = splits_of(source)
    files: list[str] = []
    try:
        rows = read_rows(source, split, config)
    except DataError:
        if splits or not Path(source).is_dir():
            raise
        rows = read_rows(source, split, config, by_file=True)  # a folder of images for each client
    if Path(source).is_dir() and not splits:
        files = _owners(source)
    columns = [_column(name, rows) for name in rows.dataset.column_names]
    plain = [column.name for column in columns if column.kind in ("text", "number")]
    columns = [replace(c, torn=_torn(c.name, plain, rows)) if c.name.lower() in GROUPS else c for c in columns]
    return Survey(source, len(rows), columns, files, bool(splits) and "test" in splits, rows.notes)


def text_column(columns: Sequence[Column], names: Collection[str] = TEXTS) -> str | None:
    """The column that holds the text: by its name, else the longest."""
    texts = [column for column in columns if column.kind == "text" and not column.repeats]
    return next((c.name for c in _named(texts, names)), max(texts, key=lambda c: c.length).name if texts else None)


def label_column(columns: Sequence[Column], names: Collection[str] = LABELS) -> str | None:
    """The column that holds a class for each row: by its name, else what repeats most, words before numbers."""
    labels = [c for c in columns if c.repeats and c.whole and c.kind in ("text", "number") and c.length < 60]
    named = next((column.name for column in _named(labels, names)), None)
    others = [column for column in labels if column.name.lower() not in CLIENTS]
    return named or (
        min(others, key=lambda column: (column.kind == "number", column.distinct)).name if others else None
    )


def column_of(columns: Sequence[Column], kind: Kind, names: Collection[str] = ()) -> str | None:
    """A column of this kind: with one of the ``names``, or where none are given the first."""
    found = [column for column in columns if column.kind == kind]
    return next((column.name for column in (_named(found, names) if names else found)), None)


def _named(columns: Sequence[Column], names: Collection[str]) -> list[Column]:
    """Those with one of the names, in the order of the names."""
    by_name = {column.name.lower(): column for column in reversed(columns)}
    return [by_name[name] for name in names if name in by_name]


def _owners(source: str) -> list[str]:
    try:
        rows = read_rows(source, by_file=True)
    except DataError:
        return []
    owners = dict.fromkeys(str(rows.part(index).group) for index in range(len(rows)))
    return list(owners) if len(owners) > 1 else []


def _torn(group: str, names: Collection[str], rows: Rows) -> frozenset[str]:
    if group not in names:
        return frozenset()
    values = {name: list(map(str, rows.values(name))) for name in names}
    return frozenset(
        name for name in names if len(set(zip(values[group], values[name], strict=True))) > len(set(values[group]))
    )


def _column(name: str, rows: Rows) -> Column:
    values = [value for value in rows.values(name) if not missing(value)]
    names = rows.class_names(name)
    if names is not None:
        values = [[names[item] for item in value] if isinstance(value, list) else names[value] for value in values]
    kind = _kind(values[:_ENOUGH])
    sizes = sorted(_size(value) for value in values)
    mean, long = (sum(sizes) / len(sizes), sizes[int(0.95 * (len(sizes) - 1))]) if sizes else (0.0, 0)
    single = [item for value in values for item in (value if kind == "list" else [value])]
    counted = Counter(item for item in single if isinstance(item, str)) if kind != "image" else Counter[str]()
    whole = kind != "number" or all(float(value.replace(",", ".")).is_integer() for value in counted)
    return Column(name, kind, len(values), len(counted), mean, long, counted.most_common(_COMMON), whole)


def _kind(values: Sequence[Any]) -> Kind:
    if not values:
        return "other"
    if all(isinstance(value, list) for value in values):
        items = [item for value in values for item in value]
        chat = items and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in items)
        return "chat" if chat else "list"
    if all(isinstance(value, dict) and value.keys() <= {"bytes", "path"} for value in values):
        return "image"
    if not all(isinstance(value, str) for value in values):
        return "other"
    if all(Path(value).suffix.lower() in IMAGES for value in values):
        return "image"
    return "number" if all(_NUMBER.fullmatch(value.strip()) for value in values) else "text"


def _size(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_size, value))
    return sum(len(item) for item in value.values() if isinstance(item, str)) if isinstance(value, dict) else len(value)
