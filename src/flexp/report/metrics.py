"""The run's diary: ``metrics.jsonl``, one JSON object a line, in the order in which things happened.

Three kinds of record are written (see ``docs/design.md``): ``step`` (one optimiser step of a client),
``eval`` (the scores of a client's personal model after a round, round 0 being before training) and
``round`` (clock and traffic so far). A killed process leaves at most half a line at the end; whoever reads
or appends next ignores or removes that half.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flexp.errors import StorageError
from flexp.files import replacing, storage_error
from flexp.finite import cleaned

Record = dict[str, Any]


class MetricsLog:
    """Appends records to ``path``; each is handed to the operating system before :meth:`write` returns.

    Opening an existing file removes a half-written last line, so that the next record starts on a line of
    its own.

    Raises:
        StorageError: the file cannot be written, or a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._open()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. NaN and infinities become ``null``."""
        if self._file is None:
            raise StorageError(f"{self.path}: the log is closed; open it again to append")
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise storage_error(self.path, error) from error

    def truncate_after(self, round: int) -> int:
        """Drop the records of rounds later than ``round`` and return how many were dropped.

        The file is replaced by rename: a crash leaves the old diary or the new one. Used when a run resumes
        from a checkpoint that is older than the diary.
        """
        records = read(self.path)
        kept = [record for record in records if int(record.get("round", 0)) <= round]
        if len(kept) < len(records):
            self.close()
            write_records(self.path, kept)
            self._open()
        return len(records) - len(kept)

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = _whole_length(self.path)
            self._file = self.path.open("ab")
            if whole is not None:
                self._file.truncate(whole)
        except OSError as error:
            raise storage_error(self.path, error) from error


def read(path: Path) -> list[Record]:
    """Read all records of ``path`` in order; a half-written last line is left out.

    Raises:
        StorageError: the file is missing, or a line other than the last is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be read ({error.strerror or error}); expected the diary of a run"
        ) from error
    lines = content.split(b"\n")
    lines.pop()  # what follows the last newline: nothing, or half a line
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            raise StorageError(f"{path}:{number}: is not a JSON object; remove that line to read the others")
        records.append(record)
    return records


class Follower:
    """Reads a diary that another process writes, a piece at a time: each call gives what came since the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0

    def new(self) -> list[Record]:
        """Whole records after those that were given before; all of them again where the diary was cut short."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._at:
                self._at = 0
            file.seek(self._at)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._at += len(whole)
        return [record for line in whole.splitlines() if (record := _parse(line)) is not None]


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole diary atomically, in place of what stood at ``path``."""
    with replacing(path) as part, part.open("wb") as file:
        file.writelines(_line(record) for record in records)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:  # also a broken UTF-8 sequence
        return None
    return cleaned(value) if isinstance(value, dict) else None


def _whole_length(path: Path) -> int | None:
    """Bytes up to and including the last newline, or None when nothing has to be removed."""
    if not path.exists():
        return None
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    return whole if whole < len(content) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
