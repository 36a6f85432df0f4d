"""Checkpoints of a run: one folder a round, tensors as safetensors, checked by their hashes when they are read."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexp.errors import StorageError
from flexp.files import read_json, replacing, sha256, write_json

KEEP = 2
"""How many checkpoints a run keeps: the last one, and one to fall back on."""

INDEX = "checkpoint.json"
"""Names the party of each file: clients may be called what no file can be called."""

State = dict[str, dict[str, Tensor]]


def save(folder: Path, number: int, state: Mapping[str, Mapping[str, Tensor]], best: int | None = None) -> Path:
    """Write the state of every party after round ``number``; earlier checkpoints beyond :data:`KEEP` go.

    A checkpoint is there whole or not at all: it is written beside its place and renamed.

    Args:
        best: a round whose checkpoint stays, however old it is.

    Raises:
        StorageError: the disk is full or cannot be written; earlier checkpoints are untouched.
    """
    place = _place(folder, number)
    with replacing(place) as part:
        part.mkdir()
        parties = {}
        for index, (party, tensors) in enumerate(state.items()):
            file = part / f"{index:03d}-{_slug(party)}.safetensors"
            parties[party] = {"file": file.name, "sha256": _write(file, tensors)}
        write_json(part / INDEX, {"schema": 1, "round": number, "parties": parties})
    spare = {place, *sorted(folder.glob("round-*"))[-KEEP:]} | ({_place(folder, best)} if best is not None else set())
    for old in set(folder.glob("round-*")) - spare:
        shutil.rmtree(old, ignore_errors=True)
    return place


def latest(folder: Path) -> Path | None:
    """The folder of the last complete checkpoint; ``None`` without any."""
    found = sorted(path for path in folder.glob("round-*") if (path / INDEX).exists())
    return found[-1] if found else None


def kept(folder: Path) -> dict[int, Path]:
    """The complete checkpoints that are there, by their rounds, ascending."""
    found = sorted(path for path in folder.glob("round-*") if (path / INDEX).exists())
    return {int(path.name.removeprefix("round-")): path for path in found}


def load(place: Path) -> tuple[int, State]:
    """Read a checkpoint: its round, and the state of every party.

    Raises:
        StorageError: a file is missing or is not what was saved.
    """
    number, parties = _index(place)
    return number, {party: _read(place, file, expected) for party, (file, expected) in parties.items()}


def load_party(place: Path, party: str) -> dict[str, Tensor] | None:
    """Read the state of one party; ``None``: the checkpoint has none.

    Raises:
        StorageError: its file is missing or is not what was saved.
    """
    _, parties = _index(place)
    return _read(place, *parties[party]) if party in parties else None


def replace_party(place: Path, party: str, tensors: Mapping[str, Tensor]) -> None:
    """Put another state in the place of a party's, whose file need not be there; all other files stay as they are.

    Raises:
        StorageError: the checkpoint has no such party, lacks other files, or the disk is full; then it is untouched.
    """
    number, parties = _index(place)
    if party not in parties:
        raise StorageError(f"{place / INDEX} names no {party}; it has {', '.join(sorted(parties))}")
    with replacing(place) as part:
        part.mkdir()
        entries = {}
        for name, (file, expected) in parties.items():
            if name == party:
                expected = _write(part / file.name, tensors)
            else:
                shutil.copyfile(file, part / file.name)
            entries[name] = {"file": file.name, "sha256": expected}
        write_json(part / INDEX, {"schema": 1, "round": number, "parties": entries})


def _index(place: Path) -> tuple[int, dict[str, tuple[Path, str]]]:
    """The round of a checkpoint, and every party's file with its hash."""
    try:
        facts = read_json(place / INDEX)
        number = int(facts["round"])
        return number, {party: (place / entry["file"], entry["sha256"]) for party, entry in facts["parties"].items()}
    except (StorageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{place / INDEX} is not what was saved; {_mend(place)}") from error


def _read(place: Path, file: Path, expected: str) -> dict[str, Tensor]:
    if not file.exists() or sha256(file) != expected:
        problem = "is missing" if not file.exists() else "is not what was saved (its SHA-256 differs)"
        raise StorageError(f"{file} {problem}; {_mend(place)}")
    tensors: dict[str, Tensor] = load_file(file)
    return tensors


def _write(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one party's tensors; the file's hash."""
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file)
    except SafetensorError as error:
        raise os_error(error) from error
    return sha256(file)


def _mend(place: Path) -> str:
    return f"delete the folder {place.name} to go on from the checkpoint before it"


def clear_halves(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    for half in folder.glob(".round-*.part"):
        shutil.rmtree(half, ignore_errors=True)


def _place(folder: Path, number: int) -> Path:
    return folder / f"round-{number:05d}"


def _slug(party: str) -> str:
    """What of a name any file system takes; the index before it tells equal ones apart."""
    return re.sub(r"[^A-Za-z0-9]+", "-", party).strip("-")[:40] or "party"


def os_error(error: SafetensorError) -> OSError:
    """safetensors tells a full disk, as everything else, in words only."""
    full = "No space left" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, str(error))
