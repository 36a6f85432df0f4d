"""What a run saves: numbered checkpoints, there whole or not at all, checked when they are read.

One layout for a simulation's checkpoints (every party in one), for what a deployed client or server saves of itself
(one party each) and for blocks that a client has parked::

    FOLDER/checkpoint-00000012/checkpoint.json                 version, facts, and each party's file with its SHA-256
    FOLDER/checkpoint-00000012/000-server.safetensors
    FOLDER/checkpoint-00000012/001-client-north.safetensors

A party may be called what no file can be called: the index says whose a file is. Nothing is ever unpickled. In use::

    store = Store(folder, keep=2)
    store.claim()                                              # whoever writes: keeps other processes off
    store.save(12, {"server": tensors, "client-north": more}, {"steps": 40})
    store.numbers()                                            # [11, 12]
    store.load(12)["server"]                                   # checked and copied
    newest = store.newest_whole(quarantine=True)               # a Checkpoint: number, facts, parties
    newest.load("client-north", lambda name: name.startswith("personal/"))
    store.quarantine(12)                                       # nobody goes on from it any more
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexp.errors import StorageError
from flexp.files import folder_name, replacing, sha256, storage_error, write_json

INDEX, VERSION = "checkpoint.json", 2
QUARANTINED = ".quarantined"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
"""Where a run's folder and a client's have theirs."""

LOCK, LOCK_SECONDS = ".lock", 5.0  # who is just leaving may still hold it
REPLACED = "replaced"  # among a checkpoint's facts
_PREFIX = "checkpoint-"
_OLDER = ("round-*/checkpoint.json", "snapshot-*/snapshot.json")

Parties = dict[str, dict[str, Tensor]]
Entry = tuple[Path, str]
"""A party's file, and its SHA-256."""


def party_of(client: str) -> str:
    """What a client's part of a checkpoint is called; the server's is ``server``."""
    return f"client-{client}"


class OtherVersionError(StorageError):
    """Another version of FlexP has saved this; it is whole, and nothing is done with it."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved state, whose index was read and whose files are read, and checked once, when they are asked for.

    Attributes:
        facts: what was saved with it, JSON.
        files: each party's file, inside ``place``, with its SHA-256.
    """

    number: int
    place: Path
    facts: dict[str, Any]
    files: dict[str, Entry]
    _whole: set[str] = field(default_factory=set, repr=False)

    def check(self) -> None:
        """Read every file.

        Raises:
            StorageError: one is missing or is not what was saved.
        """
        for party in self.files:
            self.checked(party)

    def checked(self, party: str) -> Path:
        """The safetensors file of a party.

        Raises:
            StorageError: there is no such party, or its file is missing or is not what was saved.
        """
        if party not in self.files:
            raise StorageError(self.lacks(party))
        file, expected = self.files[party]
        try:
            if party not in self._whole and sha256(file) != expected:
                raise StorageError(f"{file} is not what was saved (its SHA-256 differs); {_mend(self.place)}")
        except OSError as error:
            raise StorageError(f"{file} is missing or cannot be read; {_mend(self.place)}") from error
        self._whole.add(party)
        return file

    def replaced(self, party: str) -> Any:
        """What was said of the tensors that stand in a party's place; ``None``: they are the run's own."""
        noted = self.facts.get(REPLACED, {}).get(party)
        return None if noted is None or noted["sha256"] == self.files[party][1] else noted["said"]

    def lacks(self, party: str) -> str:
        """What to say of a party that is not in it."""
        return f"{self.place} has nothing of {party}; it has {', '.join(sorted(self.files))}"

    def load(self, party: str, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """The party's tensors with a ``wanted`` name, copied; no other is read into memory.

        Raises:
            StorageError: see :meth:`checked`.
        """
        place = self.checked(party)
        try:
            with safe_open(place, framework="pt") as file:
                return {name: file.get_tensor(name).clone() for name in file.keys() if wanted(name)}  # noqa: SIM118
        except SafetensorError as error:
            raise StorageError(f"{place} holds no tensors ({error}); {_mend(self.place)}") from error


class Store:
    """The checkpoints in ``folder``. A full disk, or a kill in the middle of saving, leaves earlier ones as they were.

    Args:
        keep: how many stay, the newest; ``None``: all.
    """

    def __init__(self, folder: Path, keep: int | None = 2) -> None:
        self.folder, self.keep = folder, keep
        self._lock: BaseFileLock | None = None

    def claim(self) -> None:
        """Make the folder, see that it can be written, keep other processes off until :meth:`close`, and remove what a
        killed process left half written.

        Raises:
            StorageError: it cannot be written, another process writes there, or an older version of FlexP has saved
                there.
        """
        if self.folder.is_file():
            raise StorageError(
                f"{self.folder} is a file, in which older versions of FlexP kept a server's state; this one saves in a "
                "folder: choose another"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial = self.folder / f".{os.getpid()}.trial"
            trial.touch()
            trial.unlink()
            # One lock for all stores of a folder in a process, which ends with the last of them, or with the process
            if self._lock is None:
                lock = FileLock(self.folder / LOCK, is_singleton=True, thread_local=False)
                lock.acquire(timeout=LOCK_SECONDS)
                self._lock = lock
        except Timeout:
            raise StorageError(
                f"{self.folder}: another process saves there; wait until it is over, stop it, or choose another folder"
            ) from None
        except OSError as error:
            raise storage_error(self.folder, error) from error
        except NotImplementedError:
            pass  # a file system without locks
        self.numbers()
        for half in self.folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(half, ignore_errors=True)

    def close(self) -> None:
        """Let other processes save there."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def numbers(self) -> list[int]:
        """Those that were written to their end, ascending.

        Raises:
            StorageError: there are only those of an older version.
        """
        found = [place.parent.name.removeprefix(_PREFIX) for place in self.folder.glob(f"{_PREFIX}*/{INDEX}")]
        if not found and any(next(self.folder.glob(pattern), None) for pattern in _OLDER):
            raise OtherVersionError(
                f"{self.folder} was saved by an older version of FlexP, whose checkpoints this one does not read: go "
                "on with that version, or train again in another folder"
            )
        return sorted(int(number) for number in found if number.isdigit())

    def save(
        self,
        number: int,
        parties: Mapping[str, Mapping[str, Tensor] | Entry],
        facts: Mapping[str, Any] | None = None,
        best: int | None = None,
    ) -> None:
        """Write a checkpoint beside its place, rename, and let the oldest go.

        Args:
            parties: the tensors of each; or a file of another checkpoint, which is copied.
            facts: JSON.
            best: one that stays, however old it is.

        Raises:
            StorageError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        with replacing(self._place(number)) as part:
            part.mkdir()
            entries = {}
            for index, (party, content) in enumerate(parties.items()):
                file = part / f"{index:03d}-{folder_name(party)}.safetensors"
                entries[party] = {"file": file.name, "sha256": _write(file, content)}
            write_json(part / INDEX, {"version": VERSION, "facts": dict(facts or {}), "parties": entries})
        if self.keep is not None:
            self.only({*self.numbers()[-self.keep :], number, best})

    def only(self, numbers: Collection[int | None]) -> None:
        """Let all others go."""
        for old in set(self.numbers()) - set(numbers):
            shutil.rmtree(self._place(old), ignore_errors=True)

    def replace(self, number: int, party: str, tensors: Mapping[str, Tensor], said: Any = None) -> None:
        """Put other tensors in the place of a party's, whose file need not be there; other files stay as they are.

        Args:
            said: JSON, of what is put there: what :meth:`Checkpoint.replaced` tells.

        Raises:
            StorageError: the checkpoint has no such party, lacks other files, another process saves there, or the disk
                is full; it is untouched.
        """
        there = self.open(number)
        if party not in there.files:
            raise StorageError(there.lacks(party))
        facts, known = there.facts, there.facts.get(REPLACED, {})
        if said is not None:
            first = known.get(party, {"sha256": there.files[party][1]})
            facts = {**facts, REPLACED: {**known, party: {**first, "said": said}}}
        with closing(Store(self.folder, keep=None)) as whole:
            whole.claim()
            whole.save(number, {**there.files, party: tensors}, facts)

    def open(self, number: int) -> Checkpoint:
        """One of :meth:`numbers`; only its index is read.

        Raises:
            StorageError: that is damaged, of another version, or names files outside of its folder.
        """
        place = self._place(number)
        try:
            index = json.loads((place / INDEX).read_text(encoding="utf-8"))
            version, facts = index["version"], dict(index["facts"])
            files = {p: (_inside(place, entry["file"]), str(entry["sha256"])) for p, entry in index["parties"].items()}
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"{place / INDEX} is not what was saved ({error}); {_mend(place)}") from error
        if version != VERSION:
            raise OtherVersionError(
                f"{place / INDEX} is of version {version}, and this FlexP reads {VERSION}: go on with the FlexP that "
                "wrote it"
            )
        return Checkpoint(number, place, facts, files)

    def load(self, number: int) -> Parties:
        """The tensors of every party of one of :meth:`numbers`.

        Raises:
            StorageError: something is missing or is not what was saved.
        """
        checkpoint = self.open(number)
        return {party: checkpoint.load(party) for party in checkpoint.files}

    def newest_whole(self, *, quarantine: bool = False) -> Checkpoint | None:
        """The newest whose files are all what was saved; ``None`` without any.

        Args:
            quarantine: damaged ones on the way; else nothing changes.

        Raises:
            OtherVersionError: another version of FlexP has saved there.
        """
        for number in reversed(self.numbers()):
            try:
                checkpoint = self.open(number)
                checkpoint.check()
                return checkpoint
            except OtherVersionError:
                raise
            except StorageError:
                if quarantine:
                    self.quarantine(number)
        return None

    def quarantine(self, number: int) -> None:
        """Give a checkpoint another name, under which nobody goes on from it."""
        place = self._place(number)
        aside = place.with_name(place.name + QUARANTINED)
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)

    def _place(self, number: int) -> Path:
        return self.folder / f"{_PREFIX}{number:08d}"


class ParkedOnDisk:
    """Blocks that a client has given up for want of memory, and may have back: a checkpoint for each.

    Args:
        numbering: of the client's steps (:class:`flexp.client.exchange.Steps`), which tells its blocks from those that
            an earlier run left in the same folder.
    """

    def __init__(self, folder: Path, numbering: int) -> None:
        self._store, self._numbering = Store(folder, keep=None), numbering

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write it beside its place and rename.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        self._store.save(block, {"block": tensors}, {"numbering": self._numbering})

    def get(self, block: int) -> dict[str, Tensor] | None:
        """What was put there; ``None``: nothing, or it is damaged, or another run's."""
        try:
            if block not in self._store.numbers():
                return None
            found = self._store.open(block)
            return found.load("block") if found.facts.get("numbering") == self._numbering else None
        except StorageError:
            return None


def os_error(error: SafetensorError) -> OSError:
    """safetensors tells a full disk, as everything else, in words only."""
    full = "No space left" in str(error)
    return OSError(errno.ENOSPC if full else errno.EIO, str(error))


def _write(file: Path, content: Mapping[str, Tensor] | Entry) -> str:
    """Write one party's tensors, or copy them; the file's SHA-256."""
    if isinstance(content, tuple):
        shutil.copyfile(content[0], file)
        return content[1]
    try:
        save_file({name: value.detach().contiguous() for name, value in content.items()}, file)
    except SafetensorError as error:
        raise os_error(error) from error
    return sha256(file)


def _inside(place: Path, name: str) -> Path:
    """The file ``name`` of a checkpoint; an index that came from elsewhere could name any file of this machine.

    Raises:
        ValueError: it is not directly in the folder.
    """
    file = place / name
    if Path(name).name != name or file.resolve().parent != place.resolve():
        raise ValueError(f"it names {name!r}, which is not in its folder")
    return file


def _mend(place: Path) -> str:
    return f"delete the folder {place.name} to go on from the checkpoint before it"
