from __future__ import annotations

from pathlib import Path

import pytest

from flexp.comparison import compare
from flexp.comparison.cells import Cell
from tests.tiny import bert_folder

from .tools import ENDED, Inline


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a tiny model in ``model``."""
    bert_folder(tmp_path / "model")
    return tmp_path


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells are done in this process, and kept here in their order."""
    monkeypatch.setattr(compare, "Pool", Inline)
    ENDED.clear()
    return ENDED
