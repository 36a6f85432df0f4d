"""One party's snapshots: numbered, whole or not there, checked when they are read, the last few kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flexp.errors import StorageError
from flexp.files import read_json, replacing, sha256, write_json
from flexp.run.checkpoints import os_error

STATE, FACTS = "state.safetensors", "snapshot.json"


class Snapshots:
    """In ``folder``; a full disk or a kill in the middle of saving leaves the earlier ones as they were.

    Args:
        keep: how many stay, the newest first.
        tidy: remove what a killed process left half written; not where one may be writing.
    """

    def __init__(self, folder: Path, keep: int = 3, *, tidy: bool = True) -> None:
        self.folder, self.keep = folder, keep
        for half in folder.glob(".snapshot-*") if tidy else ():
            shutil.rmtree(half, ignore_errors=True)

    def numbers(self) -> list[int]:
        """Those that are complete, ascending."""
        found = [path.parent.name.removeprefix("snapshot-") for path in self.folder.glob(f"snapshot-*/{FACTS}")]
        return sorted(int(number) for number in found if number.isdigit())

    def save(self, number: int, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write ``state`` and ``facts`` (JSON) beside their place, rename, and let the oldest go.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        with replacing(self._place(number)) as part:
            part.mkdir()
            try:
                save_file({name: value.detach().contiguous() for name, value in state.items()}, part / STATE)
            except SafetensorError as error:
                raise os_error(error) from error
            write_json(part / FACTS, {**facts, "number": number, "sha256": sha256(part / STATE)})
        for old in self.numbers()[: -self.keep]:
            shutil.rmtree(self._place(old), ignore_errors=True)

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state and the facts of one of :meth:`numbers`.

        Raises:
            StorageError: it is not what was saved.
        """
        file, facts = self.checked(number)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, facts  # noqa: SIM118

    def checked(self, number: int) -> tuple[Path, dict[str, Any]]:
        """The safetensors file and the facts of one of :meth:`numbers`, for who reads tensor by tensor.

        Raises:
            StorageError: it is not what was saved.
        """
        place = self._place(number)
        try:
            facts: dict[str, Any] = read_json(place / FACTS)
            if sha256(place / STATE) != facts["sha256"]:
                raise StorageError(f"{place / STATE} is not what was saved (its SHA-256 differs)")
            with safe_open(place / STATE, framework="pt"):
                return place / STATE, facts
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise StorageError(f"{place} is damaged ({error}); delete it to go on from an earlier snapshot") from error

    def newest_whole(self) -> dict[str, Any] | None:
        """The facts, ``number`` among them, of the newest whose content is what was saved.

        Damaged ones are put aside under another name.
        """
        for number in reversed(self.numbers()):
            try:
                return self.load(number)[1]
            except StorageError:
                self.put_aside(number, "damaged")
        return None

    def put_aside(self, number: int, why: str = "aside") -> None:
        """Give a snapshot another name, under which nobody goes on from it."""
        place = self._place(number)
        aside = place.with_suffix(f".{why}")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)

    def _place(self, number: int) -> Path:
        return self.folder / f"snapshot-{number:08d}"
