"""Checkpoints of a run: one folder a round, tensors as safetensors, checked by their hashes when they are read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexp.errors import StorageError
from flexp.files import read_json, replacing, sha256, write_json

KEEP = 2
"""How many checkpoints a run keeps: the last one, and one to fall back on."""

State = dict[str, dict[str, Tensor]]


def save(folder: Path, number: int, state: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write the state of every party after round ``number``; earlier checkpoints beyond :data:`KEEP` go.

    A checkpoint is there whole or not at all: it is written beside its place and renamed.

    Raises:
        StorageError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    place = folder / f"round-{number:05d}"
    with replacing(place) as part:
        part.mkdir()
        hashes = {}
        for party, tensors in state.items():
            file = part / f"{party}.safetensors"
            try:
                save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file)
            except SafetensorError as error:
                raise OSError(
                    getattr(error, "errno", None) or 28 if "space" in str(error) else 5, str(error)
                ) from error
            hashes[party] = sha256(file)
        write_json(part / "checkpoint.json", {"schema": 1, "round": number, "sha256": hashes})
    for old in sorted(folder.glob("round-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def latest(folder: Path) -> Path | None:
    """The folder of the last complete checkpoint; ``None`` without any."""
    found = sorted(path for path in folder.glob("round-*") if (path / "checkpoint.json").exists())
    return found[-1] if found else None


def load(place: Path) -> tuple[int, State]:
    """Read a checkpoint: its round, and the state of every party.

    Raises:
        StorageError: a file is missing or is not what was saved.
    """
    facts: dict[str, Any] = read_json(place / "checkpoint.json")
    state: State = {}
    for party, expected in facts["sha256"].items():
        file = place / f"{party}.safetensors"
        if not file.exists() or sha256(file) != expected:
            problem = "is missing" if not file.exists() else "is not what was saved (its SHA-256 differs)"
            raise StorageError(
                f"{file} {problem}; delete the folder {place.name} to go on from the checkpoint before it"
            )
        state[party] = load_file(file)
    return int(facts["round"]), state
