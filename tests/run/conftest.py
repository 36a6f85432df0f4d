from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import bert_folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a tiny model in ``model``."""
    bert_folder(tmp_path / "model", dropout=True)
    return tmp_path
