"""The report of a comparison: tables, CSV, figures and one HTML page, all from the contents of ``comparison.json``.

Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def write_all(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every table and the page into ``folder``; see :func:`flexp.comparison.report.write.write_all`."""
    from flexp.comparison.report import write

    return write.write_all(comparison, folder)


def terminal_table(comparison: Mapping[str, Any]) -> Table:
    """The table for the terminal; see :func:`flexp.comparison.report.tables.terminal_table`."""
    from flexp.comparison.report import tables

    return tables.terminal_table(comparison)
