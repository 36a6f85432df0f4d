"""One client's personal parts as one file: weights, optimiser, counters, and what they belong to.

The file is safetensors, its facts are JSON in its metadata, with a SHA-256 over both; with a passphrase it is sealed
(:mod:`flexp.export.sealed`). It goes back only where it came from or into a run that is made alike: any other model,
cut, tuning or method is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flexp.errors import ConfigError, StorageError
from flexp.export.homes import KIND, SCHEMA, Backup, home_of
from flexp.export.saved import LAST
from flexp.export.sealed import is_sealed, seal, unseal
from flexp.files import replacing

MUST_MATCH = {
    "fingerprint": "configuration of the model",
    "weights": "pretrained model (its weights differ)",
    "model_kind": "head",
    "labels": "set of labels",
    "method": "method.name",
    "cut": "cut",
    "tuning": "model.tuning",
    "lora": "model.lora",
    "train_embeddings": "model.train_embeddings",
    "dtype": "model.dtype",
    "optimizer": "train.personal.name",
    "follow": "method.align.follow",
}
"""Facts in which a file and the run that it goes into must agree, and what each is called."""

OLDER = {"follow": False}
"""Facts that files of older versions do not have."""


def back_up(
    folder: Path, client: str | None, out: Path, passphrase: str | None = None, which: str = LAST
) -> dict[str, Any]:
    """Write the personal parts of ``client`` in ``folder``, a run or a client's own, to the new file ``out``.

    Args:
        passphrase: encrypt with it.
        which: after which round (:func:`flexp.export.saved.open_run`).

    Returns:
        The facts that the file has.

    Raises:
        ConfigError: ``out`` is there already, or the method keeps nothing of a client's own.
        StorageError: the run's checkpoint is not there or damaged, or the disk cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")
    home = home_of(folder, client, which)
    tensors = home.tensors()
    facts = home.facts | {"steps": int(tensors["steps"]) if "steps" in tensors else None}
    write(out, tensors, facts, passphrase)
    return facts


def restore(file: Path, folder: Path, client: str | None = None, passphrase: str | None = None) -> dict[str, Any]:
    """Put a file's content into the last checkpoint of the run ``folder``; ``flexp run --resume`` goes on from there.

    The client's part of the checkpoint may be damaged or missing; the other parts stay as they are, byte for byte. In
    what ``flexp client`` left it becomes the newest snapshot, from which the client goes on; later ones are put aside.

    Args:
        client: into whose place; the file's own client without.

    Returns:
        The file's facts, with ``into``: the round of the checkpoint, or the number of the snapshot.

    Raises:
        ConfigError: the run is of another model, cut, tuning or method, or has no such client.
        StorageError: the file or the run is damaged; the run is untouched.
    """
    found = read(file, passphrase)
    home = home_of(folder, client or str(found.facts["client"]), LAST, into=True)
    there = home.facts
    for key, called in MUST_MATCH.items():
        saved = found.facts.get(key, OLDER.get(key))
        if saved != there[key]:
            raise ConfigError(
                f"{file}: was saved with another {called} than {folder} has "
                f"({_short(saved)}, not {_short(there[key])}); restore it into the run that it is of"
            )
    _check_shapes(found.tensors, home.fresh(), file)
    number = home.put(found)
    return found.facts | {"client": there["client"], "into": number}


def write(out: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], passphrase: str | None = None) -> None:
    """Write tensors and JSON-ready facts as one file, there whole or not at all.

    Raises:
        ConfigError: the passphrase is empty.
        StorageError: the disk is full or cannot be written.
    """
    flat = {name: value.detach().contiguous() for name, value in tensors.items()}
    text = json.dumps(facts, sort_keys=True)
    content = save(flat, metadata={"format": "pt", "flexp": text, "sha256": _digest(flat, text)})
    if passphrase is not None:
        seal(out, content, passphrase)
        return
    with replacing(out) as part:
        part.write_bytes(content)


def read(file: Path, passphrase: str | None = None) -> Backup:
    """Read a file that :func:`write` made.

    Raises:
        ConfigError: it is encrypted, and there is no passphrase.
        StorageError: the passphrase is wrong, or the file is damaged or something else.
    """
    encrypted = is_sealed(file)
    if encrypted and passphrase is None:
        raise ConfigError(f"{file} is encrypted: say where its passphrase is with --passphrase-env VARIABLE")
    content = unseal(file, passphrase or "") if encrypted else file.read_bytes()
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text, digest = header["flexp"], header["sha256"]
        facts = json.loads(text)
        known = facts["kind"] == KIND
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{file} is not what flexp state backup wrote, or damaged; use another copy") from error
    if not known or facts["schema"] != SCHEMA:
        raise StorageError(f"{file} is of another version of FlexP; expected schema {SCHEMA} of a {KIND}")
    if _digest(tensors, text) != digest:
        raise StorageError(f"{file} is damaged: its content is not what was saved (its SHA-256 differs)")
    return Backup(facts, tensors, encrypted)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_shapes(saved: Mapping[str, Tensor], fresh: Mapping[str, Tensor], file: Path) -> None:
    """A client that has not trained yet has the same entries but for the optimiser's memory."""
    for name, value in fresh.items():
        other = saved.get(name)
        if other is None or (other.shape, other.dtype) != (value.shape, value.dtype):
            what = "is not in the file" if other is None else f"is {tuple(other.shape)}, not {tuple(value.shape)}"
            raise StorageError(f"{file}: does not fit this run's client: {name} {what}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
