"""One file to one table, with the row numbers that messages need. Reads locally: no network, no cache.

Values are text as it was written, in every format: ``007`` and ``7``, ``1e5`` and ``100000`` are different clients,
groups and labels, and nobody guesses types. Parquet has types of its own; `written` says how they are written.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from flexp.data.excel import read_excel
from flexp.data.table import Table, unlike, written
from flexp.errors import DataError

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def read_file(path: Path) -> Table:
    """Read one data file by its suffix: csv, tsv, json, jsonl, parquet, txt or xlsx.

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


_SAID = re.compile(r'"?sep=(.)"?\r?\n', re.IGNORECASE)
"""A first line by which Excel is told what divides columns."""
_SAMPLE = 1 << 16
"""Characters that show how a table is written."""


def _csv(path: Path) -> Table:
    encoding, note = _encoding(path)
    with path.open(encoding=encoding, newline="") as file:
        sample = file.read(_SAMPLE)
    cut = len(sample) == _SAMPLE
    said = _SAID.match(sample)
    skip, sample = (1, sample[said.end() :]) if said else (0, sample)
    if not sample.strip():
        raise DataError(f"{path}: is empty; its first line must name the columns")
    delimiter = said[1] if said else "\t" if path.suffix.lower() == ".tsv" else _delimiter(sample, cut)
    if delimiter != ("\t" if path.suffix.lower() == ".tsv" else ","):
        note.append(f"columns divided by {delimiter!r}")
    lines = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
    names = next(line for line in lines if line)  # empty ones are passed over below as well
    unlike(path, names)
    try:
        data = pa.csv.read_csv(
            path,
            read_options=pa.csv.ReadOptions(encoding=encoding, skip_rows=skip),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is not a well-formed table ({_first_line(error)})") from error
    if data.column_names != names:  # what is not named would be guessed to be numbers or dates
        raise DataError(f"{path}: its first line, which names the columns, cannot be told apart from others")
    if delimiter == "\t" and (odd := _swallowed(data)):
        note.append(
            f"{odd} cells with line ends and tabs within quotation marks (a lone \" at a cell's beginning does that)"
        )
    return Table(data, note=f"{path.name}: read as {', '.join(note)}" if note else None)


def _swallowed(data: pa.Table) -> int:
    """Cells that hold whole lines of a table whose columns tabs divide, which texts hardly have."""
    both = (pc.and_(*(pc.match_substring(column, sign) for sign in ("\t", "\n"))) for column in data.columns)
    return sum(pc.sum(column).as_py() or 0 for column in both)


def _encoding(path: Path) -> tuple[str, list[str]]:
    """How the file's text is encoded, by its mark or by trying, and what to say where it is not UTF-8."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        _whole(path, content.decode("utf-16"))
        return "utf-16", ["UTF-16"]
    try:
        _whole(path, content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        _western(path, content, error.start)
        return "cp1252", ["Windows-1252 text, since it is not UTF-8"]
    return "utf-8-sig" if content.startswith(codecs.BOM_UTF8) else "utf-8", []


def _western(path: Path, content: bytes, start: int) -> None:
    """Refuse as Windows-1252 what is UTF-8 with a damaged place, or writing of another part of the world, where most
    letters beyond ASCII stand side by side."""
    tried = content.decode("utf-8", "replace")
    if len(re.findall("[^\\x00-\\x7f\ufffd]", tried)) > tried.count("\ufffd"):
        line = content.count(b"\n", 0, start) + 1
        raise DataError(f"{path}, line {line}: is no longer UTF-8 text at byte {start}; mend it there, or save it anew")
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is neither UTF-8 nor Windows-1252 text (byte {error.start}); save it as UTF-8"
        ) from error
    _whole(path, text)
    runs = re.findall(r"[^\W\d_\x00-\x7f]+", text)
    odd = [run for run in runs if len(run) > 2]
    if 2 * sum(map(len, odd)) > sum(map(len, runs)):
        raise DataError(f"{path}: is not UTF-8, and would read {odd[0][:20]!r} as Windows-1252; save it as UTF-8")


def _whole(path: Path, text: str) -> None:
    """Refuse what no text has: tokenizers would read over it, or words end there."""
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise DataError(
            f"{path}, line {line}: holds a zero byte, as damaged files have, and UTF-16 without its mark; save it as "
            "UTF-8"
        )


def _delimiter(sample: str, cut: bool) -> str:
    """What divides columns: the first of the usual signs that divides the first lines in equally many, else the one
    that divides the very first in most; a comma where none does."""
    widths: dict[str, int] = {}
    for sign in ",;\t|":
        reader = csv.reader(io.StringIO(sample, newline=""), delimiter=sign)
        try:
            rows = [row for row in islice(reader, 20) if row]
        except csv.Error:
            continue
        if cut and len(rows) > 1 and next(reader, None) is None:
            del rows[-1]  # the sample ends within it
        widths[sign] = len(rows[0])
        if len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows):
            return sign
    return max(widths, key=widths.__getitem__, default=",")


def _parquet(path: Path) -> Table:
    try:
        data = pa.parquet.read_table(path, partitioning=None)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is not a Parquet file ({_first_line(error)})") from error
    unlike(path, data.column_names)
    for index, field in enumerate(data.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if _text_like(kind):
            data = data.set_column(index, field.name, data.column(index).cast(pa.string()))
        elif kind != field.type:
            data = data.set_column(index, field.name, data.column(index).cast(kind))
        elif not _known(kind):
            nested = "map<" in str(kind)  # no task reads one
            values = [None if nested else written(value) for value in data.column(index).to_pylist()]
            data = data.set_column(index, field.name, pa.array(values, pa.string()))
    return Table(data)


def _known(kind: pa.DataType) -> bool:
    """Whether the datasets library has such a type."""
    from datasets.features.features import generate_from_arrow_type

    try:
        generate_from_arrow_type(kind)
    except ValueError:
        return False
    return True


def _text_like(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _jsonl(path: Path) -> Table:
    rows, numbers = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_parsed(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: is not JSON ({error}); write one object a line") from error
            numbers.append(number)
    return Table(_columns(path, rows, "line", numbers), "line", numbers)


class _Number(str):
    """A number as it is written in JSON. Its kind tells it from text: ``7`` and ``"7"`` in one column are refused."""


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=_constant, object_pairs_hook=_object)


def _constant(name: str) -> _Number | None:
    return None if name == "NaN" else _Number(name)  # how Python writes that nothing is there


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one object has two values for {Counter(name for name, _ in pairs).most_common(1)[0][0]!r}")
    return found


def _json(path: Path) -> Table:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = _parsed(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # one object a line under the wrong suffix
            return _jsonl(path)
        raise DataError(f"{path}: is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {type(rows).__name__} instead of a list of objects, one for each row")
    return Table(_columns(path, rows, "row", range(1, len(rows) + 1)))


def _text(path: Path) -> Table:
    """A row for each paragraph; for each line where no blank line divides paragraphs."""
    content = path.read_text(encoding="utf-8-sig")
    _whole(path, content)
    lines = content.splitlines()
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
    return pa.table({name: _column(path, name, [row.get(name) for row in rows], unit, numbers) for name in names})


def _column(path: Path, name: str, values: list[Any], unit: str, numbers: Sequence[int]) -> pa.Array:
    kinds = [type(value) for value in values]
    first = next((kind for kind in kinds if kind is not type(None)), None)
    odd = next((index for index, kind in enumerate(kinds) if kind not in (first, type(None))), None)
    if odd is not None and first is not None:
        raise DataError(
            f"{path}, {unit} {numbers[odd]}: the column {name!r} mixes kinds of values "
            f"({_kind(kinds[odd])} after {_kind(first)}); make them all of one kind"
        )
    try:
        return pa.array([written(value) for value in values], pa.string() if first in (str, _Number, bool) else None)
    except UnicodeEncodeError as error:
        bad = next(index for index, value in enumerate(values) if not _is_text(value))
        raise DataError(
            f"{path}, {unit} {numbers[bad]}: the column {name!r} holds half of a character (a lone surrogate); "
            "write it anew from its source"
        ) from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: the column {name!r} mixes kinds of values ({_first_line(error)})") from error


def _kind(kind: type) -> str:
    return {_Number: "a number", str: "text", bool: "true or false", list: "a list", dict: "an object"}[kind]


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    ".xlsx": read_excel,
    ".xlsm": read_excel,
}
