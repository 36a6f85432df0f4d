from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.planner.tools import counted_on_tensors
from tests.tiny import bert_folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a tiny model in ``model``."""
    bert_folder(tmp_path / "model", dropout=True)
    return tmp_path


@pytest.fixture(autouse=True, scope="session")
def _counted_on_tensors() -> Iterator[None]:
    with counted_on_tensors():
        yield
