"""What is kept of a forward until its backward, and the bytes of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Kept:
    """Bytes that autograd keeps of a forward, without the weights: they are there anyway."""

    def __init__(self, model: nn.Module, *, keep: bool = True) -> None:
        self.keep = keep
        self._weights = {_place(value) for values in (model.parameters(), model.buffers()) for value in values}
        self._found: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Every storage once, however many nodes of the graph keep a view of it."""
        return sum(self._found.values())

    def pack(self, value: Tensor) -> Tensor | None:
        """Autograd is about to keep ``value``."""
        if not self.keep:
            return None
        place = _place(value)
        if place not in self._weights:
            self._found[place] = value.untyped_storage().nbytes()
        return value.detach()  # an output that its own node keeps would never be freed


@contextmanager
def counted(model: nn.Module, *, keep: bool = True) -> Iterator[Kept]:
    """Count what autograd keeps of the forwards of ``model`` inside the ``with`` block; or let it keep nothing, so that
    no backward can follow."""
    kept = Kept(model, keep=keep)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _same):
        yield kept


def bytes_of(*values: Any) -> int:
    """Of tensors; what is none counts nothing."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _same(value: Tensor) -> Tensor:
    return value


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
