"""The files of a comparison's report, each written beside its place and renamed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexp.comparison.report import csvs, page, texts
from flexp.comparison.report.grids import grids
from flexp.comparison.report.results import checked
from flexp.errors import StorageError
from flexp.files import write_text

TABLE_MD, TABLE_CSV, TABLE_TEX = "table.md", "table.csv", "table.tex"
CLIENTS_CSV, PAGE = "clients.csv", "comparison.html"


def write_all(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.tex``, ``clients.csv`` and ``comparison.html`` into ``folder``.

    Args:
        comparison: the contents of ``comparison.json``, schema 1.

    Returns:
        The paths, in that order.

    Raises:
        StorageError: ``comparison`` is not of that schema, or a file cannot be written. All is made before anything
            is written, so that files never disagree with one another because of a mistake in the data.
    """
    comparison = checked(comparison)
    try:
        tables = grids(comparison)
        name = str(comparison["name"])
        texts_by_file = {
            TABLE_MD: texts.markdown(name, tables),
            TABLE_CSV: csvs.methods_csv(comparison),
            TABLE_TEX: texts.latex(name, tables),
            CLIENTS_CSV: csvs.clients_csv(comparison),
            PAGE: page.render(comparison),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(
            f"comparison.json is not as FlexP writes it ({type(error).__name__}: {error}); restore it, or compare again"
        ) from error
    paths = []
    for file, text in texts_by_file.items():
        write_text(folder / file, text)
        paths.append(folder / file)
    return paths
