"""Blocks that a client has given up, on its disk: it gives them up for want of memory, and may have them back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flexp.errors import StorageError
from flexp.run.store import Snapshots


class ParkedOnDisk:
    """A snapshot for each block, with a checksum, of one run's client.

    Args:
        numbering: of the client's steps (:class:`flexp.client.exchange.Steps`), which tells its blocks from those that
            an earlier run left in the same folder.
    """

    def __init__(self, folder: Path, numbering: int) -> None:
        self.folder, self.numbering = folder, numbering

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write it beside its place and rename.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        self._place(block).save(0, tensors, {"numbering": self.numbering, "block": block})

    def get(self, block: int) -> dict[str, Tensor] | None:
        """What was put there; ``None``: nothing, or it is damaged, or another run's."""
        place = self._place(block)
        if not place.numbers():
            return None
        try:
            tensors, facts = place.load(0)
        except StorageError:
            return None
        return tensors if facts.get("numbering") == self.numbering else None

    def _place(self, block: int) -> Snapshots:
        return Snapshots(self.folder / f"block-{block}", keep=1)
