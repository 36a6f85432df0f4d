"""Tokens that need not cross: padding, and rows of h that no loss reads.

What does cross of an activation (B, T, H) are its chosen tokens one after the other, (1, N, H). On the other side zeros
stand where the rest was. That changes no bit of what is trained: a block's attention gives padding no weight, and where
the loss reads nothing the gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.links.asking import ExtendRequest
from flexp.links.messages import ForwardRequest

S = TypeVar("S", ForwardRequest, ExtendRequest)


@dataclass(frozen=True)
class Places:
    """The tokens of a (B, T) that cross.

    Attributes:
        shape: (B, T).
        places_N: their places, b·T + t, in order.
    """

    shape: tuple[int, int]
    places_N: Tensor

    @classmethod
    def of(cls, flags_BT: Tensor) -> Places:
        """Those whose flag is not zero."""
        return cls((flags_BT.shape[0], flags_BT.shape[1]), flags_BT.flatten().nonzero().squeeze(1))

    def __len__(self) -> int:
        return len(self.places_N)

    def pack(self, value_BTH: Tensor) -> Tensor:
        """(B, T, H) as (1, N, H)."""
        return value_BTH.flatten(0, 1)[self._on(value_BTH)].unsqueeze(0)

    def unpack(self, value_1NH: Tensor) -> Tensor:
        """(1, N, H) as (B, T, H), with zeros between."""
        width = value_1NH.shape[-1]
        whole = value_1NH.new_zeros(self.shape[0] * self.shape[1], width)
        whole[self._on(value_1NH)] = value_1NH[0]
        return whole.view(*self.shape, width)

    def _on(self, value: Tensor) -> Tensor:
        return self.places_N.to(value.device, non_blocking=True)


def pack(value_BTH: Tensor, kept: Places | None) -> Tensor:
    """What crosses of it; all of it where nothing is left out."""
    return value_BTH if kept is None else kept.pack(value_BTH)


def unpack(value: Tensor, kept: Places | None) -> Tensor:
    """:func:`pack` undone."""
    return value if kept is None else kept.unpack(value)


def without_padding(mask_BT: Tensor | None) -> Places | None:
    """The tokens under a mask; ``None``: there is no padding, or nothing else."""
    if mask_BT is None or bool(mask_BT.all()) or not bool(mask_BT.any()):
        return None
    return Places.of(mask_BT)


def sent(request: S, kept: Places | None) -> S:
    """A request with whole activations as what crosses of it."""
    return request if kept is None else _each(request, kept.pack)


def arrived(request: S, who: str) -> tuple[S, Places | None]:
    """A request with its activations whole again, and the tokens that crossed (``None``: all).

    Raises:
        LinkError: there are not as many as its mask says.
    """
    mask_BT, given = request.mask_BT, request.hidden_BTH.shape
    if mask_BT is None or given[:2] == mask_BT.shape or given[0] != 1 or mask_BT.dim() != 2:
        return request, None
    kept = Places.of(mask_BT)
    if len(kept) != given[1]:
        raise LinkError(f"{who}: {given[1]} tokens came, expected {len(kept)} as its mask says")
    return _each(request, kept.unpack), kept


def on(request: S, device: torch.device) -> S:
    """The same request with all of its tensors on ``device``."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return replace(request, **{field.name: moved(getattr(request, field.name)) for field in fields(request)})


def _each(request: S, change: Callable[[Tensor], Tensor]) -> S:
    changes: dict[str, Any] = {"hidden_BTH": change(request.hidden_BTH)}
    if isinstance(request, ForwardRequest):
        changes["base_BTH"] = None if request.base_BTH is None else change(request.base_BTH)
        changes["inner_BTH"] = tuple(map(change, request.inner_BTH))
    return replace(request, **changes)
