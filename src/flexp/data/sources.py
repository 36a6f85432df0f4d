"""From what the user named (a file, a folder, an asset, a ``datasets`` id) to rows that know where they came from."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flexp.data.columns import nearest, require
from flexp.data.readers import IMAGES, READERS, read_file
from flexp.data.table import Table, written
from flexp.data.types import PLACE
from flexp.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files that say what they are for, as the datasets library reads them."""
_NAMED = 6  # files that a message lists
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Part:
    """A run of consecutive rows that came from one file."""

    count: int
    file: str
    unit: str = "row"
    numbers: Sequence[int] | None = None
    folder: Path | None = None
    group: str | None = None  # the client, when files or folders are clients
    columns: Sequence[str] = ()
    note: str | None = None


class Rows:
    """A :class:`datasets.Dataset`, and for every row its file, number and (with files as clients) its client."""

    def __init__(self, name: str, dataset: Dataset, parts: Sequence[Part]) -> None:
        self.name = name
        self.dataset = dataset
        self._parts = list(parts)
        self._starts = [0, *accumulate(part.count for part in parts)]
        self.notes = [part.note for part in parts if part.note is not None]

    def __len__(self) -> int:
        return self._starts[-1]

    def require(self, column: str, key: str) -> None:
        """Check that every file has ``column``, which the configuration's ``key`` names.

        Raises:
            DataError: one has not.
        """
        for part in self._parts:
            require(column, key, part.columns, part.file)

    def values(self, column: str) -> list[Any]:
        """A whole column: text as written, or the numbers of a ``ClassLabel``."""
        values = self.dataset.data.column(column).to_pylist()
        return list(values) if self.class_names(column) else [written(value) for value in values]

    def class_names(self, column: str) -> list[str] | None:
        """The names of a ``ClassLabel`` column, or of one with lists of them, else None."""
        feature = self.dataset.features[column]
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return list(names) if names else None

    def part(self, index: int) -> Part:
        """The part to which row ``index`` belongs."""
        return self._parts[bisect.bisect_right(self._starts, index) - 1]

    def place(self, index: int) -> str:
        """Where row ``index`` stands, for messages: ``reviews.jsonl, line 17``."""
        which = bisect.bisect_right(self._starts, index) - 1
        part, offset = self._parts[which], index - self._starts[which]
        number = offset + 1 if part.numbers is None else part.numbers[offset]
        return f"{part.file}, {part.unit} {number}"

    def take(self, indices: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """The given rows with the given columns and their place under ``PLACE``."""
        table = self.dataset.data.table.select(list(columns)).take(pa.array(indices, pa.int64()))
        rows: list[dict[str, Any]] = table.to_pylist()
        for row, index in zip(rows, indices, strict=True):
            row |= {name: written(value) for name, value in row.items()}
            row[PLACE] = self.place(index)
        return rows


def read_rows(source: str, split: str | None = None, config: str | None = None, by_file: bool = False) -> Rows:
    """Read all rows of ``source``: a data file, a folder of data files or images, ``asset:NAME``, or a ``datasets`` id.

    ``SOURCE#SPLIT`` names a split as well. Of a folder, the files of ``split`` are read, else those of ``train`` by
    their names, else those of no split: what is called test or validation never joins training.
    Only a ``datasets`` id may use the network.

    Args:
        by_file: every file or sub-folder of the folder is a client.

    Raises:
        DataError: nothing readable is there.
        AssetError: an asset is unknown or cannot be had.
    """
    source, _, wanted = source.partition("#") if not Path(source).exists() else (source, "", "")
    split = wanted or split
    path = Path(_resolve(source)).expanduser()
    if path.is_file():
        if by_file:
            raise DataError(
                f'{path}: is a single file, but clients.by = "file" needs a folder with a file or folder for each '
                'client; use clients.by = "column" or a partitioner'
            )
        return _join(str(path), [_file(path)])
    if path.is_dir():
        return _join(str(path), _folder(path, split, by_file))
    if not _is_hub(source):
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder (data.source or data.test_source){nearest(path.name, beside)}")
    if by_file:
        raise DataError(f'{source}: clients.by = "file" needs a local folder, and there is none of that name')
    return _hub(source, config, split or "train")


def _is_hub(source: str) -> bool:
    """Whether what is no file or folder here may be an id of ``datasets``."""
    local = source.startswith(("/", ".", "~", "asset:")) or Path(source).suffix.lower() in READERS
    return not local and _HUB_ID.fullmatch(source) is not None


def _resolve(source: str) -> str | Path:
    if not source.startswith("asset:"):
        return source
    from flexp.assets import resolve

    return resolve(source)


def _file(path: Path, group: str | None = None) -> tuple[Table, Part]:
    table = read_file(path)
    return table, Part(
        table.data.num_rows,
        path.name,
        table.unit,
        table.numbers,
        path.parent,
        group,
        table.data.column_names,
        table.note,
    )


def _folder(path: Path, split: str | None, by_file: bool) -> list[tuple[Table, Part]]:
    children = _children(path)
    if by_file:
        found = []
        _refuse_tests(path, children)
        owners: dict[str, Path] = {}
        for child in children:
            name = child.name if child.is_dir() else child.stem
            if not child.is_dir() and child.suffix.lower() not in READERS:
                continue
            if name in owners:
                raise DataError(
                    f"{path}: {owners[name].name} and {child.name} are both the client {name!r} by their names; put "
                    "them into one folder of that name, or give one another name"
                )
            owners[name] = child
            found += _inside(child, name) if child.is_dir() else [_file(child, name)]
        found = _noted(found, path, owners.values())
    else:
        chosen = [child for child in children if _of_split(child, split)]
        if split is not None and not chosen:
            raise DataError(
                f"{path}: there is no split {split!r}; it holds {', '.join(child.name for child in children[:8])}"
            )
        if len(chosen) == 1 and chosen[0].is_dir():
            return _folder(chosen[0], None, False)
        files = _files(path, chosen) if split else _for_training(path)
        found = _noted([_file(file) for file in files], path, files) or _images(path, None)
    if not found:
        raise DataError(
            f"{path}: holds neither data files ({', '.join(READERS)}) nor folders of images named after their labels"
        )
    return found


def _refuse_tests(path: Path, children: Sequence[Path]) -> None:
    """Where files are clients, one that is called after a split is no client, and its test rows would be trained on."""
    readable = [child for child in children if child.is_dir() or child.suffix.lower() in READERS]
    for child in readable:
        split = next((name for name in ("test", "validation") if _of_split(child, name)), None)
        if split is not None:
            raise DataError(
                f'{child}: is of the {split} split by its name, but clients.by = "file" makes each file or folder a '
                "client; move it elsewhere (data.test_source), or give it another name if it is a client"
            )


def _inside(folder: Path, group: str) -> list[tuple[Table, Part]]:
    files = _for_training(folder)
    found = _noted([_file(file, group) for file in files], folder, files) or _images(folder, group)
    if not found:
        raise DataError(
            f"{folder}: the client {group!r} is empty: its folder holds neither data files nor images; "
            "remove the folder or fill it"
        )
    return found


def _files(folder: Path, among: Sequence[Path] | None = None) -> list[Path]:
    children = _children(folder) if among is None else among
    return [child for child in children if child.is_file() and child.suffix.lower() in READERS]


def _for_training(folder: Path) -> list[Path]:
    """The data files of a folder from which no split was asked: those of ``train``, else those of no split.

    Raises:
        DataError: all are of splits that are not for training.
    """
    files = _files(folder)
    train = [file for file in files if _of_split(file, "train")]
    others = [file for file in files if not _is_split(file)]
    if files and not train and not others:
        raise DataError(
            f"{folder}: {', '.join(file.name for file in files[:8])} are not for training by their names; name the "
            "split that is (data.split), or one file as data.source"
        )
    return train or others


def _of_split(path: Path, split: str | None) -> bool:
    """Whether a file or folder belongs to ``split`` (default: train) by its name.

    ``train.csv``, ``train-00000-of-00002.parquet``, ``reviews_train.csv`` and ``training.csv`` are of ``train``.
    """
    words = re.split(r"[\W_]+|(?<=[a-z])\d+", path.stem.lower())
    split = (split or "train").lower()
    return path.stem.lower() == split or any(word in words for word in _SPLITS.get(split, (split,)))


def _is_split(path: Path) -> bool:
    return any(_of_split(path, name) for name in _SPLITS)


def splits_of(source: str) -> set[str]:
    """The splits (``train``, ``validation``, ``test``) for which a folder has files or folders by their names."""
    path = Path(source)
    children = _children(path) if path.is_dir() else []
    return {name for name in _SPLITS for child in children if _of_split(child, name)}


def split_for_tests(source: str) -> str | None:
    """``test`` where a folder has such files by their names, and of a ``datasets`` id: whoever names it for tests means
    these."""
    path = Path(source).expanduser()
    if path.exists():
        return "test" if "test" in splits_of(str(path)) else None
    return None if "#" in source or not _is_hub(source) else "test"


def _images(folder: Path, group: str | None) -> list[tuple[Table, Part]]:
    """Rows (image, label) of the images in the sub-folders of ``folder``, each of which is a label."""
    found, read = [], []
    for child in _children(folder):
        items = _children(child) if child.is_dir() else []
        files = [item for item in items if item.suffix.lower() in IMAGES]
        if files:
            data = pa.table({"image": [str(file) for file in files], "label": [child.name] * len(files)})
            part = Part(len(files), f"{child}", "image", None, folder, group, data.column_names)
            found += _noted([(Table(data), part)], child, files)
            read.append(child)
    return _noted(found, folder, read)


def _noted(found: list[tuple[Table, Part]], folder: Path, read: Collection[Path]) -> list[tuple[Table, Part]]:
    """``found``, with a note of what else is in ``folder`` that nobody asked to leave out."""
    left = [child.name for child in _children(folder) if child not in read and not _is_split(child)]
    if found and left:
        some = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
        table, part = found[0]
        note = f"{folder}: nothing is read of {some}"
        found[0] = table, replace(part, note=note if part.note is None else f"{part.note}; {note}")
    return found


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith((".", "_")))


def _join(name: str, found: Sequence[tuple[Table, Part]]) -> Rows:
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    # Named here, since it would hash all rows for a name of its own.
    tables = [Dataset(InMemoryTable(table.data), fingerprint=str(number)) for number, (table, _) in enumerate(found)]
    try:
        dataset = tables[0] if len(tables) == 1 else concatenate_datasets(tables)
    except (ValueError, pa.ArrowInvalid) as error:
        names = sorted({part.file for _, part in found})
        raise DataError(
            f"{name}: the files {', '.join(names[:6])} have columns of the same name but different kinds; "
            "make them alike or name one file as data.source"
        ) from error
    return Rows(name, dataset, [part for _, part in found])


def _hub(source: str, config: str | None, split: str) -> Rows:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # the variables come too late where the libraries are loaded already
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        dataset = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the library raises its own, requests', the system's ...
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise DataError(
            f"{source}: there is no such file here, and it cannot be loaded as a datasets id "
            f"(config {config!r}, split {split!r}): {reason}"
        ) from error
    return Rows(
        source, dataset.flatten_indices(), [Part(len(dataset), f"{source}[{split}]", columns=dataset.column_names)]
    )
