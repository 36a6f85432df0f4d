"""Comparisons of the tiny configuration, with cells done in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexp.comparison import workers
from flexp.comparison.cells import Cell
from flexp.comparison.config import CompareConfig, Comparison, make
from tests.tiny import config

ENDED: list[Cell] = []


class Inline:
    """Does what :class:`flexp.comparison.workers.Pool` does, without processes."""

    free = 1

    def __init__(self, jobs: int, out: Path) -> None:
        self.out = out
        self.cells: list[Cell] = []

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def busy(self) -> bool:
        return bool(self.cells)

    def give(self, cell: Cell) -> None:
        self.cells.append(cell)

    def take(self) -> Iterator[tuple[Cell, str | None]]:
        cell = self.cells.pop()
        ENDED.append(cell)
        yield cell, workers.attempt(cell, self.out, threads=1)


def comparison(folder: Path, compare: dict[str, Any], **changes: Any) -> Comparison:
    """The tiny run compared as ``compare`` says."""
    return make(config(folder, **changes), CompareConfig.model_validate(compare))
