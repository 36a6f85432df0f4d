"""What clients add up through the server: it keeps what each gives, and answers when all have given theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from flexp.errors import BadValuesError, LinkError
from flexp.links.messages import SumReply, SumRequest
from flexp.links.sums import Sums, added

MOST = 4
"""Sums of a run: two meetings with two each."""


class SumTable:
    """The sums of one run by their numbers.

    A sum is taken in the order of the clients' names, whoever came first, and stays: who asks again, after a broken
    link or a snapshot, gets it again, whatever it gives the second time.

    Attributes:
        clients: who must have given something; nobody: nothing is summed.
        done: what is known already.
    """

    def __init__(self) -> None:
        self.clients: tuple[str, ...] = ()
        self.done: dict[int, Sums] = {}
        self._given: dict[int, dict[str, Sums]] = {}
        self._waiting: dict[int, dict[str, Future[SumReply]]] = {}

    def open(self, clients: Iterable[str]) -> None:
        """Add up what these give from now on."""
        self.clients = tuple(clients)

    def give(self, client: str, request: SumRequest) -> Future[SumReply]:
        """Take what a client gives; the sum, once all have.

        Raises:
            LinkError: nothing is summed in this run, or not of this client, or others gave tensors of other shapes.
            BadValuesError: a number is not finite.
        """
        number, answer = request.number, Future[SumReply]()
        if client not in self.clients:
            raise LinkError(
                f"client {client} gives a sum, and this run has none of its: set method.meet.on (or model.head = "
                '"closed-form") in the server\'s configuration as well'
            )
        if number >= MOST:
            raise LinkError(f"client {client} gives sum {number}, and a run has {MOST}, counted from 0")
        if number in self.done:
            answer.set_result(SumReply(self.done[number]))
            return answer
        given = self._given.setdefault(number, {})
        for other in given.values():
            if _shapes(other) != _shapes(request.weights):
                raise LinkError(f"client {client} gives sums of other shapes than others: set the same [method.meet]")
        if not all(bool(torch.isfinite(value).all()) for value in request.weights.values()):
            raise BadValuesError(f"client {client}: a sum that it gives is not finite")
        given[client] = {name: value.detach().clone() for name, value in request.weights.items()}
        self._waiting.setdefault(number, {})[client] = answer
        if all(name in given for name in self.clients):
            self.done[number] = added([self._given[number][name] for name in self.clients])
            del self._given[number]
            for future in self._waiting.pop(number).values():
                if future.set_running_or_notify_cancel():
                    future.set_result(SumReply(self.done[number]))
        return answer

    def state(self) -> Sums:
        """The sums that are known, flat."""
        return {f"{number}/{name}": value for number, sums in self.done.items() for name, value in sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; what was given for other sums is forgotten."""
        self.done, self._given, self._waiting = {}, {}, {}
        for entry, value in state.items():
            number, _, name = entry.partition("/")
            self.done.setdefault(int(number), {})[name] = value.clone()


def _shapes(sums: Sums) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in sums.items()}
