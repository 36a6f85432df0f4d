"""Tiny trained runs, and what their personal models answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from flexp.config.loading import validate
from flexp.export.saved import SavedRun
from flexp.models.zoo import save_tiny
from flexp.run import runner
from tests.data.tools import jsonl, labelled, tokenizer

CLIENTS = ("north", "south")
CUTS = [[1, 3], [2, None]]


def train(folder: Path, arch: str, clients: tuple[str, ...] = CLIENTS, **tables: Any) -> Path:
    """A finished run in ``folder`` on a tiny model: a classifier of texts or images where it is one, else a decoder."""
    runner.run(validate(content_of(folder, arch, clients, **tables), "test"), folder / "run")
    return folder / "run"


def content_of(folder: Path, arch: str, clients: tuple[str, ...] = CLIENTS, **tables: Any) -> dict[str, Any]:
    """The configuration of such a run, its model and its data being in ``folder``."""
    model = save_tiny(arch, folder / "model")
    data: dict[str, Any] = {"max_length": 16, "clients": {"each": [{"cut": cut} for cut in CUTS]}}
    if arch == "vit":
        _images(folder, model)
        data |= {
            "source": str(folder / "images"),
            "task": "image-classification",
            "clients": {"by": "iid", "count": 2, "each": [{"cut": cut} for cut in CUTS]},
        }
    elif arch == "bert":
        tokenizer(bert=True).save_pretrained(model)
        data["source"] = str(jsonl(folder / "rows.jsonl", labelled(60, clients)))
    else:
        tokenizer().save_pretrained(model)
        rows = [
            {"text": f"the w{k % 40} dog runs fast {'now ' * (k % 3)}", "client": clients[k % len(clients)]}
            for k in range(40)
        ]
        data |= {"source": str(jsonl(folder / "rows.jsonl", rows)), "task": "causal-lm"}
    rate = {"name": "adamw", "lr": 1e-2}
    content: dict[str, Any] = {
        "threads": 1,
        "model": {"id": str(model)},
        "data": data,
        "train": {"rounds": 1, "steps_per_round": 2, "batch_size": 4, "personal": rate, "shared": rate},
        "evaluation": {"measure_memory": False},
        "output": {"tensorboard": False, "html": False},
    }
    for table, keys in tables.items():
        content[table] = {**content.get(table, {}), **keys}
    return content


def batch_of(run: SavedRun, client: str) -> dict[str, Tensor]:
    """Some of the client's test examples as one padded batch, without labels."""
    batch = run.world.federation.task.collate(run.client(client).test[:6])
    return {key: value for key, value in batch.items() if key != "labels"}


def answer(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits in float32; of tokens those that are no padding, which no party sends to another."""
    if hasattr(model, "eval"):
        model.eval()
        with torch.no_grad():
            return of_text(model(**batch).logits, batch)
    return of_text(model(batch).logits, batch)


def of_text(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """In float32, of the tokens under the mask where there is one answer a token."""
    return (logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits).float()


def _images(folder: Path, model: Path) -> None:
    size = transformers.AutoConfig.from_pretrained(model).image_size
    transformers.ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(model)
    generator = np.random.default_rng(0)
    for number in range(24):
        label = ("cross", "ring", "bar")[number % 3]
        place = folder / "images" / label / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 250, (size, size, 3), dtype=np.uint8)).save(place)
