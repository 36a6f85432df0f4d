"""Sums over clients: how one party gives its part and gets the total. What is summed is nobody's business here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

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
    """The sum of tensors with equal names, taken in double precision and in the order in which they stand."""
    return {
        name: torch.stack([one[name].double() for one in given]).sum(0).to(value.dtype)
        for name, value in given[0].items()
    }
