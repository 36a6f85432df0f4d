"""Every task through a whole run: three clients, another cut each, on a tiny model of the fitting kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from flexp.config.loading import validate
from flexp.models.zoo import save_tiny
from flexp.run import runner
from tests.data.tools import jsonl, tokenizer

CLIENTS = ("north", "south", "west")


def llama(folder: Path) -> Path:
    place = save_tiny("llama", folder / "model")
    tokenizer().save_pretrained(place)
    return place


def run(folder: Path, place: Path, source: Path, data: dict[str, Any], **tables: Any) -> dict[str, Any]:
    content = {
        "threads": 1,
        "model": {"id": str(place)},
        "data": {
            "source": str(source),
            "clients": {"each": [{"cut": [1, 3]}, {"cut": [2, None]}, {"cut": [3, 4]}]},
            **data,
        },
        "train": {"rounds": 2, "steps_per_round": 3, "batch_size": 4, "micro_batch": 2, "personal": {"lr": 1e-3}},
        "evaluation": {"measure_memory": False},
        "output": {"tensorboard": False, "html": True},
        **tables,
    }
    summary = runner.run(validate(content, "test"), folder / "out")
    assert summary["finished"]
    assert len(summary["clients"]) == 3
    for client in summary["clients"]:
        assert client["last"]["personal"] is not None
        assert client["last"]["global"] is not None
    return summary


def test_causal_lm(tmp_path: Path) -> None:
    rows = [{"text": "the red dog runs fast now " * 4, "client": CLIENTS[k % 3]} for k in range(36)]
    data = {"task": "causal-lm", "block_length": 12, "max_length": 12}
    summary = run(tmp_path, llama(tmp_path), jsonl(tmp_path / "rows.jsonl", rows), data)
    assert summary["metric"] == "perplexity"
    for client in summary["clients"]:
        assert client["last"]["personal"] < client["before"]["personal"]


def test_instruction(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is w{k} ?", "answer": "the blue cat", "client": CLIENTS[k % 3]} for k in range(36)]
    data = {"task": "instruction", "max_length": 48}
    run(tmp_path, llama(tmp_path), jsonl(tmp_path / "rows.jsonl", rows), data, method={"align": {"kind": "off"}})


def test_multiple_choice(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"what is w{k} ?",
            "choices": ["red", "blue", "green", "fast"],
            "label": k % 4,
            "client": CLIENTS[k % 3],
        }
        for k in range(36)
    ]
    data = {"task": "multiple-choice", "max_length": 64}
    summary = run(tmp_path, llama(tmp_path), jsonl(tmp_path / "rows.jsonl", rows), data)
    assert summary["metric"] == "accuracy"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_image_folder(tmp_path: Path, tuning: str) -> None:
    model = save_tiny("vit", tmp_path / "model")
    size = transformers.AutoConfig.from_pretrained(model).image_size
    processor = transformers.ViTImageProcessorPil(size={"height": size, "width": size})
    processor.save_pretrained(model)
    generator = np.random.default_rng(0)
    for number in range(30):
        label = ("cross", "ring", "bar")[number // 3 % 3]
        pixels = generator.integers(0, 60, (size, size, 3), dtype=np.uint8)
        pixels[..., ("cross", "ring", "bar").index(label)] += 150
        place = tmp_path / "images" / label / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    data = {
        "task": "image-classification",
        "clients": {"by": "iid", "count": 3, "each": [{"cut": [1, 3]}, {"cut": [2, None]}, {"cut": [3, 4]}]},
    }
    tables = {"model": {"id": str(model), "tuning": tuning}}
    run(tmp_path, model, tmp_path / "images", data, **tables)
