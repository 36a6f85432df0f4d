"""A server's sums on its disk, each before anybody has it: whoever falls, a client that goes back has them again.

``FOLDER/RUN/NUMBER.safetensors``, with a SHA-256. Of clients' masked sums nothing is readable there (:mod:`sums`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexp.errors import StorageError
from flexp.files import folder_name, replacing
from flexp.links.asking import SumReply

ENDING = ".safetensors"


class Journal:
    """The sums of one run.

    Args:
        folder: of a server's sums. Those of another run go when this one has its first: no client that is in the
            middle of another run gives anything to it.
        say: is told what could not be written: it is in memory alone.
    """

    def __init__(self, folder: Path, run: str, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._alone = folder / folder_name(run), say, False
        for half in self._folder.glob(".*.part"):
            half.unlink(missing_ok=True)

    @property
    def numbers(self) -> list[int]:
        """Of all sums that are there."""
        names = [path.name.removesuffix(ENDING) for path in self._folder.glob(f"*{ENDING}")]
        return sorted(int(name) for name in names if name.isdigit())

    def read(self, number: int) -> SumReply:
        """One of :attr:`numbers`.

        Raises:
            StorageError: it is not what was written.
        """
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata()
                values = file.get_tensor("values").clone() if "values" in file.keys() else None  # noqa: SIM118
            notes, whole = json.loads(said["notes"]), said["sha256"] == _digest(values, said["notes"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{path} is no sum of clients ({error}); {_MEND}") from error
        if not whole:
            raise StorageError(f"{path} is not what was saved (its SHA-256 differs); {_MEND}")
        return SumReply(values, notes)

    def write(self, number: int, reply: SumReply) -> bool:
        """One more; gives whether it could be written."""
        values = {} if reply.values_N is None else {"values": reply.values_N.contiguous()}
        notes = json.dumps(reply.notes)
        try:
            with replacing(self._path(number)) as part:
                save_file(values, part, {"notes": notes, "sha256": _digest(reply.values_N, notes)})
        except (StorageError, SafetensorError, OSError) as error:
            self._say(f"sum {number} was not saved, so no client can have it again if this server falls: {error}")
            return False
        if not self._alone:
            self._drop_others()
        return True

    def _drop_others(self) -> None:
        for other in self._folder.parent.iterdir():
            if other != self._folder and all(path.suffix in (ENDING, ".part") for path in other.glob("*")):
                shutil.rmtree(other, ignore_errors=True)
        self._alone = True

    def forget(self, number: int) -> None:
        """Nobody needs it any more."""
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}{ENDING}"


_MEND = "delete it: a client that goes back, and needs it, is then told so"


def _digest(values: torch.Tensor | None, notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    if values is not None:
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
