"""One client's personal parts as one file: weights, optimiser, counters, and what they belong to.

The file is safetensors, its facts are JSON in its metadata, with a SHA-256 over both; with a passphrase it is sealed
(:mod:`flexp.export.sealed`). It goes back only where it came from or into a run that is made alike: any other model,
cut, tuning or method is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flexp.client.recut import PERSONAL
from flexp.data.split import check_same
from flexp.errors import ConfigError, StorageError
from flexp.export.opening import open_trained
from flexp.export.saved import is_run, run_config
from flexp.export.sealed import is_sealed, seal, unseal
from flexp.export.trained import LAST, FromCheckpoint
from flexp.files import replacing
from flexp.run.belonging import MUST_MATCH, belonging, check_match
from flexp.run.folder import is_client

SCHEMA = 1
KIND = "flexp personal state"


@dataclass(frozen=True)
class Backup:
    """What a file holds.

    Attributes:
        tensors: the client's state, as its method names it; with FlexP-SFL ``personal/NAME`` are the weights.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    encrypted: bool

    @property
    def weights(self) -> dict[str, Tensor]:
        """The personal weights by their names in the whole model."""
        return {name.removeprefix(PERSONAL): value for name, value in self.tensors.items() if name.startswith(PERSONAL)}


def back_up(
    folder: Path, client: str | None, out: Path, passphrase: str | None = None, which: str = LAST
) -> dict[str, Any]:
    """Write the personal parts of ``client`` in ``folder``, a run or a client's own, to the new file ``out``.

    Args:
        passphrase: encrypt with it.
        which: after which round (:func:`flexp.export.opening.open_trained`).

    Returns:
        The facts that the file has.

    Raises:
        ConfigError: ``out`` is there already, or the method keeps nothing of a client's own.
        StorageError: the run's checkpoint is not there or damaged, or the disk cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")
    model = _opened(folder, client, which)
    tensors = model.state()
    facts = _facts(model, model.cut) | {"round": model.round, "steps": model.steps}
    facts["data"] = model.identity(model.client)
    known = ("run", "numbering", "met")
    numbers = {key: model.checkpoint.facts[key] for key in known if key in model.checkpoint.facts}
    if numbers:  # of a server's run, to which the client is to come back
        facts["snapshot"] = {**numbers, "number": model.checkpoint.number}
    write(out, tensors, facts, passphrase)
    return facts


def restore(file: Path, folder: Path, client: str | None = None, passphrase: str | None = None) -> dict[str, Any]:
    """Put a file's content into the last checkpoint of the run ``folder``; ``flexp run --resume`` goes on from there.

    The client's part of the checkpoint may be damaged or missing; the other parts stay as they are, byte for byte. In
    what ``flexp client`` left it becomes the newest snapshot, from which the client goes on; later ones are
    quarantined.

    Args:
        client: into whose place; the file's own client without.

    Returns:
        The file's facts, with ``into``: the round of the checkpoint, or the number of the snapshot.

    Raises:
        ConfigError: the run is of another model, cut, tuning or method, or has no such client.
        DataError: the client's data are others there.
        StorageError: the file or the run is damaged; the run is untouched.
    """
    found = read(file, passphrase)
    model = _opened(folder, client or str(found.facts["client"]), LAST)
    cut, fresh = model.place()
    there = _facts(model, cut)
    check_match(found.facts, there, tuple(MUST_MATCH), file, folder, "restore it into the run that it is of")
    own = model.identity(str(found.facts["client"]))
    if own is not None and client in (None, found.facts["client"]):
        mend = "it would be tested with what it was trained on: restore it into the run that it is of"
        check_same(found.facts.get("data"), own, file, mend)
    _check_shapes(found.tensors, fresh, file)
    number = model.put(found.tensors, found.facts)
    return found.facts | {"client": model.client, "into": number}


def _facts(model: FromCheckpoint, cut: tuple[int, int]) -> dict[str, Any]:
    head = {"kind": KIND, "schema": SCHEMA, "client": model.client, "cut": list(cut)}
    return head | belonging(model.config, model.source(), model.kind, model.labels)


def _opened(folder: Path, client: str | None, which: str) -> FromCheckpoint:
    if not (is_client(folder) or is_run(folder)):
        run_config(folder)  # says what it is not
    model = open_trained(folder, client, which)
    assert isinstance(model, FromCheckpoint)
    return model


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
    odd = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if odd:
        raise StorageError(
            f"{file}: {odd[0]} holds numbers that are not finite, and nothing can go on from them; use an earlier copy"
        )
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
