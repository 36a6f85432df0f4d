"""One file to one table, with the row numbers that messages need. Reads locally: no network, no cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from flexp.errors import DataError

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Table:
    """The rows of a file; row i is ``unit`` number ``numbers[i]`` (i + 1 when None)."""

    data: pa.Table
    unit: str = "row"
    numbers: Sequence[int] | None = None


def read_file(path: Path) -> Table:
    """Read one data file by its suffix: csv, tsv, json, jsonl, parquet or txt.

    Raises:
        DataError: the format is unknown, or the file cannot be read or is empty.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: the format {path.suffix!r} is not known; use {', '.join(READERS)}, or a folder of images"
        )
    try:
        table = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if table.data.num_rows == 0:
        raise DataError(f"{path}: holds no rows; remove the file, or name another as data.source")
    return table


def _csv(path: Path) -> Table:
    try:
        data = pa.csv.read_csv(
            path,
            parse_options=pa.csv.ParseOptions(
                delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
            ),
            convert_options=pa.csv.ConvertOptions(
                null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True, timestamp_parsers=[]
            ),
        )
    except pa.ArrowInvalid as error:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty; its first line must name the columns") from error
        raise DataError(f"{path}: is not a well-formed table ({_first_line(error)})") from error
    for name, column in zip(data.column_names, data.columns, strict=True):
        if pa.types.is_binary(column.type):  # what Arrow makes of text that it cannot decode
            row = next((number for number, value in enumerate(column.to_pylist(), start=1) if not _is_utf8(value)), 1)
            raise DataError(f"{path}, row {row}: the column {name!r} is not UTF-8 text; save the file as UTF-8")
    return Table(data)


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _parquet(path: Path) -> Table:
    try:
        return Table(pa.parquet.read_table(path, partitioning=None))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is not a Parquet file ({_first_line(error)})") from error


def _jsonl(path: Path) -> Table:
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: is not JSON ({error}); write one object a line") from error
            numbers.append(number)
    return Table(_columns(path, rows, "line", numbers), "line", numbers)


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # one object a line under the wrong suffix
            return _jsonl(path)
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__} instead of a list of objects, one for each row")
    return Table(_columns(path, rows, "row", range(1, len(rows) + 1)))


def _text(path: Path) -> Table:
    """A row for each paragraph; for each line where no blank line divides paragraphs."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    texts: list[str] = []
    numbers: list[int] = []
    paragraphs = any(
        not line.strip() for line in lines[_leading_blank(lines) : len(lines) - _leading_blank(lines[::-1])]
    )
    open_paragraph = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            open_paragraph = False
        elif paragraphs and open_paragraph:
            texts[-1] += "\n" + line
        else:
            texts.append(line)
            numbers.append(number)
            open_paragraph = True
    return Table(pa.table({"text": pa.array(texts, pa.string())}), "line", numbers)


def _leading_blank(lines: Sequence[str]) -> int:
    return next((index for index, line in enumerate(lines) if line.strip()), len(lines))


def _columns(path: Path, rows: list[Any], unit: str, numbers: Sequence[int]) -> pa.Table:
    for row, number in zip(rows, numbers, strict=True):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, {unit} {number}: holds {type(row).__name__} instead of an object with named fields"
            )
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            kinds = [type(value) for value in values]
            first = next(index for index, value in enumerate(values) if value is not None)
            odd = next((i for i, kind in enumerate(kinds) if values[i] is not None and kind is not kinds[first]), None)
            where = f"{path}, {unit} {numbers[odd]}" if odd is not None else f"{path}"
            detail = f"{kinds[odd].__name__} after {kinds[first].__name__}" if odd is not None else _first_line(error)
            raise DataError(
                f"{where}: the column {name!r} mixes kinds of values ({detail}); make them all of one kind"
            ) from error
    return pa.table(columns)


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:160].rstrip(". ")


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _text,
}
