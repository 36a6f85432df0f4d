from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexp.models.stage import Stage
from flexp.run import settle
from tests.tiny import bert_folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model with dropout in ``model``."""
    folder = tmp_path_factory.mktemp("methods")
    bert_folder(folder / "model", dropout=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """Worlds of equal settings have one model in common: no method writes into it, all train copies of their own."""
    load, loaded = settle.load_part, dict[str, Stage]()
    held: dict[str, Any] = {}

    def once(config: Any, *arguments: Any) -> Stage:
        key = repr((config.model, config.seed, arguments))
        if key not in loaded:
            loaded[key] = load(config, *arguments)
            held[key] = {name: value.clone() for name, value in loaded[key].model.state_dict().items()}
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settle, "load_part", once)
        yield
    for key, stage in loaded.items():
        assert all(value.equal(held[key][name]) for name, value in stage.model.state_dict().items())
