"""A tiny model with a tokenizer on disk, tiny data, and configurations of runs that take a second."""

from __future__ import annotations

import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from flexp.config import RunConfig
from flexp.config.loading import validate
from flexp.models.zoo import save_tiny
from flexp.run.store import CHECKPOINTS, Store
from tests.data.tools import jsonl, labelled, tokenizer

CLIENTS = ("north", "south", "west")
_PLACE = tempfile.TemporaryDirectory()


def bert_folder(folder: Path, dropout: bool = False) -> Path:
    """A BERT of random weights with a word tokenizer whose ids it knows; what ``folder`` holds is written over."""
    return Path(shutil.copytree(_saved(dropout), folder, copy_function=_copied, dirs_exist_ok=True))


def _copied(source: str, target: str) -> str:
    """As a new file: the old one may be mapped."""
    Path(target).unlink(missing_ok=True)
    return shutil.copyfile(source, target)


@lru_cache
def _saved(dropout: bool) -> Path:
    place = save_tiny("bert", Path(_PLACE.name, str(dropout)))
    tokenizer(bert=True).save_pretrained(place)
    if dropout:
        text = (place / "config.json").read_text(encoding="utf-8")
        place.joinpath("config.json").write_text(
            text.replace('"hidden_dropout_prob": 0.0', '"hidden_dropout_prob": 0.2'), encoding="utf-8"
        )
        assert '"hidden_dropout_prob": 0.2' in (place / "config.json").read_text(encoding="utf-8")
    return place


CUTS: list[Any] = [[1, 4], [2, None], [3, 4]]


def each(**lists: list[Any]) -> dict[str, Any]:
    """Keys of ``[data.clients]`` that give clients in turn the values of these lists."""
    longest = max(len(values) for values in lists.values())
    return {"each": [{key: values[i % len(values)] for key, values in lists.items()} for i in range(longest)]}


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """The content of a configuration; ``changes`` are tables that replace or extend the defaults, key by key.

    ``devices`` may hold ``assign``, the device classes of clients in turn.
    """
    source = jsonl(folder / "rows.jsonl", labelled(90, CLIENTS))
    base: dict[str, Any] = {
        "name": "tiny",
        "threads": 1,
        "model": {"id": str(folder / "model")},
        "data": {
            "source": str(source),
            "max_length": 16,
            "train_examples": 12,
            "clients": each(cut=CUTS),
        },
        "train": {"rounds": 3, "steps_per_round": 2, "batch_size": 4, "order": "random"},
        "method": {"align": {"kind": "kl", "weight": 0.5}},
        "evaluation": {"measure_memory": False},
        "output": {"tensorboard": False, "html": False},
    }
    for table, keys in changes.items():
        base[table] = {**base.get(table, {}), **keys} if isinstance(keys, dict) else keys
    if classes := base.get("devices", {}).get("assign"):
        base["devices"] = {key: value for key, value in base["devices"].items() if key != "assign"}
        own = base["data"]["clients"].get("each") or [{}]
        pairs = [own * len(classes), classes * len(own)]
        base["data"]["clients"]["each"] = [{**one, "device": name} for one, name in zip(*pairs, strict=True)]
    return base


def config(folder: Path, **changes: Any) -> RunConfig:
    return validate(content(folder, **changes), "tiny")


def checkpoint(run: Path, number: int | None = None) -> dict[str, dict[str, Tensor]]:
    """Every party's tensors in the last checkpoint of a run, or in the one that is named."""
    store = Store(run / CHECKPOINTS)
    return store.load(store.numbers()[-1] if number is None else number)
