from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import bert_folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model with dropout in ``model``."""
    folder = tmp_path_factory.mktemp("methods")
    bert_folder(folder / "model", dropout=True)
    return folder
