"""Counting the bytes that are alive while something runs, of real tensors or of fake ones that only have shapes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the ``with`` block: every storage that an operation makes counts from then until nobody holds it.

    Views count nothing of their own. What a kernel allocates for itself while it runs is not seen.

    Args:
        known: tensors that were there before, which do not count.

    Attributes:
        live: bytes alive now; ``peak``: the most since :meth:`mark`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        # A storage's address may be given again after it is freed; its entry goes with it.
        self._sizes: dict[int, int] = {}
        self._static = {storage._cdata: storage for value in known for storage in [value.untyped_storage()]}

    def mark(self) -> tuple[int, int]:
        """(live, peak) since the last mark; the next peak starts from what is live now."""
        found = self.live, self.peak
        self.peak = self.live
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._static:
            return
        size = storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._gone, key)
        self._sizes[key] = size
        self.live += size - (before or 0)
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
