"""Excel workbooks: a table from the first sheet, whose first row names the columns. Needs the extra ``excel``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from flexp.data.columns import missing
from flexp.data.table import Table, unlike, written
from flexp.errors import DataError


def read_excel(path: Path) -> Table:
    """Cells as one would write them, as of a CSV file: 7 and 7.0 are ``7``, a text ``007`` stays as it is.

    Raises:
        DataError: openpyxl is not there, it is no workbook, or a column has no name or that of another.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            f"{path}: reading Excel files needs openpyxl: pip install 'flexp[excel]', or save the file as CSV"
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheet = next((sheet for sheet in book.worksheets if sheet.sheet_state == "visible"), book.worksheets[0])
        cells = _rows(sheet)
        made = _rows(openpyxl.load_workbook(path, read_only=True)[sheet.title])
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError) as error:
        raise DataError(f"{path}: is not an Excel workbook ({error}); save it as .xlsx or as CSV") from error
    _check(path, cells, made)
    filled = [(number, [written(value) for value in row]) for number, row in cells if not all(map(missing, row))]
    if not filled:
        raise DataError(f"{path}: the sheet {sheet.title!r} is empty; its first row must name the columns")
    first, titles = filled[0]
    width = max(at + 1 for _, row in filled for at, value in enumerate(row) if not missing(value))
    names = [str(name).strip() for name in _wide(titles, width) if not missing(name)]
    if len(names) < width:
        where = next(at for at, name in enumerate(_wide(titles, width), start=1) if missing(name))
        raise DataError(f"{path}, row {first}: column {where} has no name; the first row must name all columns")
    unlike(path, names)
    rows = [_wide(row, width) for _, row in filled[1:]]
    columns = {name: pa.array([row[at] for row in rows], pa.string()) for at, name in enumerate(names)}
    others = len(book.sheetnames) - 1
    note = f"{path.name}: read the sheet {sheet.title!r}, the first visible of {others + 1}" if others else None
    return Table(pa.table(columns), "row", [number for number, _ in filled[1:]], note)


def _rows(sheet: Any) -> list[tuple[int, list[Any]]]:
    sheet.reset_dimensions()  # some programs write wrong ones
    return [(number, list(row)) for number, row in enumerate(sheet.iter_rows(values_only=True), start=1)]


def _check(path: Path, cells: list[tuple[int, list[Any]]], made: list[tuple[int, list[Any]]]) -> None:
    """Refuse formulas that ended in an error, or whose results were never saved (``made`` is what was typed in)."""
    from openpyxl.cell.cell import ERROR_CODES

    formulas = [
        (number, value, source)
        for (number, row), (_, typed) in zip(cells, made, strict=True)
        for value, source in zip(row, typed, strict=True)
        if value != source or value in ERROR_CODES
    ]
    for number, value, _ in formulas:
        if value in ERROR_CODES:
            raise DataError(f"{path}, row {number}: a cell holds the error {value}; mend it, or empty the cell")
    if formulas and all(value is None for _, value, _ in formulas):
        number, _, source = formulas[0]
        raise DataError(
            f"{path}, row {number}: the formula {str(source)[:40]!r} has no result in the file; open and save it in "
            "Excel or LibreOffice, or save it as CSV"
        )


def _wide(row: list[Any], width: int) -> list[Any]:
    return [*row, *[None] * (width - len(row))][:width]
