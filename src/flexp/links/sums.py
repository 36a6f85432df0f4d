"""Sums over clients: how one party gives its part and gets the total. What is summed is nobody's business here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flexp.masking import SUMS, Scale, from_ring, to_ring

Sums = dict[str, Tensor]


class Adder(Protocol):
    """One client's way to a sum over all clients. Another one may hide what each gives."""

    def give(self, number: int, values: Sums) -> Callable[[], Sums]:
        """Give this client's part of sum ``number``; what comes back waits for the others, and gives the sum.

        All clients give tensors of the same names and shapes.
        """
        ...


class InOnePlace:
    """Sums of clients that are all in this process and give each number one after the other; no link is between them.

    Attributes:
        bytes: that each would have sent, and as many received.
    """

    def __init__(self, clients: Sequence[str]) -> None:
        self.bytes = 0
        self._clients = len(clients)
        self._given: dict[int, list[Sums]] = {}

    def give(self, number: int, values: Sums) -> Callable[[], Sums]:
        """See :class:`Adder`."""
        given = self._given.setdefault(number, [])
        if not given:
            self.bytes += sum(value.numel() * value.element_size() for value in values.values())
        given.append(values)

        def total() -> Sums:
            assert len(given) == self._clients, "all give before anybody asks"
            return added(given)

        return total


def added(given: Sequence[Sums]) -> Sums:
    """The sum of tensors with equal names, in the fixed point of sums over links: the same numbers."""
    return {
        name: real(torch.stack([fixed(one[name].double()) for one in given]).sum(0)).to(value.dtype)
        for name, value in given[0].items()
    }


def fixed(values: Tensor, scale: Scale = SUMS) -> Tensor:
    """Real numbers (float64) as integers modulo 2⁶⁴ (:func:`flexp.masking.to_ring`)."""
    return torch.from_numpy(to_ring(values.numpy(), scale).view(np.int64))


def real(sums: Tensor, scale: Scale = SUMS) -> Tensor:
    """The other way."""
    return torch.from_numpy(from_ring(sums.contiguous().numpy().view(np.uint64), scale))
