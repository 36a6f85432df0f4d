"""What clients add up through the server: it keeps what each gives, and answers when all have given theirs, or when
those that are late have been waited for long enough."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.links.asking import SumReply, SumRequest

MOST = 8
"""Sums of a run: two meetings with three each, and two in which clients agree on a key."""


class SumTable:
    """The sums of one run by their numbers: integers modulo 2⁶⁴, in which nothing need be readable here.

    A sum stays: who asks again, after a broken link or a snapshot, gets it again, whatever it gives the second time.

    Attributes:
        clients: who may give something; nobody: nothing is summed.
        done: what is known already.
    """

    def __init__(self) -> None:
        self.clients: tuple[str, ...] = ()
        self.done: dict[int, SumReply] = {}
        self._seconds: float | None = None
        self._late: set[str] = set()  # who was not there the last time, and is waited for no more
        self._lock = threading.RLock()  # whoever closes a sum does it in a thread of its own
        self._given: dict[int, dict[str, SumRequest]] = {}
        self._waiting: dict[int, dict[str, Future[SumReply]]] = {}

    def open(self, clients: Iterable[str], seconds: float | None = None) -> None:
        """Add up what these give from now on; ``seconds`` after the first of them has given, without the others."""
        self.clients, self._seconds, self._late = tuple(clients), seconds, set()

    def give(self, client: str, request: SumRequest) -> Future[SumReply]:
        """Take what a client gives; the sum, once all have.

        Raises:
            LinkError: nothing is summed in this run, or not of this client, or others gave more or fewer numbers.
        """
        with self._lock:
            return self._give(client, request)

    def _give(self, client: str, request: SumRequest) -> Future[SumReply]:
        number, answer = request.number, Future[SumReply]()
        if client not in self.clients:
            raise LinkError(
                f"client {client} gives a sum, and this run has none of its: set method.meet.on (or model.head = "
                '"closed-form") in the server\'s configuration as well'
            )
        if number >= MOST:
            raise LinkError(f"client {client} gives sum {number}, and a run has {MOST}, counted from 0")
        if number in self.done:
            answer.set_result(self.done[number])
            return answer
        if number not in self._given and self._seconds is not None:
            timer = threading.Timer(self._seconds, self._wait_no_more, [number])
            timer.daemon = True
            timer.start()
        given = self._given.setdefault(number, {})
        if any(_shape(other) != _shape(request) for other in given.values()):
            raise LinkError(f"client {client} gives sums of other shapes than others: set the same [method.meet]")
        given[client] = request
        self._late.discard(client)
        self._waiting.setdefault(number, {})[client] = answer
        if all(name in given for name in self.clients if name not in self._late):
            self._close(number)
        return answer

    def _wait_no_more(self, number: int) -> None:
        with self._lock:
            if self._given.get(number):
                self._late |= set(self.clients) - set(self._given[number])
                self._close(number)

    def _close(self, number: int) -> None:
        self.done[number] = _added(self._given.pop(number))
        for future in self._waiting.pop(number).values():
            if future.set_running_or_notify_cancel():
                future.set_result(self.done[number])

    def dismiss(self, why: LinkError) -> None:
        """Nobody waits any more, nor are their numbers kept."""
        with self._lock:
            waiting = [future for futures in self._waiting.values() for future in futures.values()]
            self._given, self._waiting = {}, {}
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(why)

    def state(self) -> dict[str, Tensor]:
        """The sums that are known, flat."""
        flat = {f"{number}/values": reply.values_N for number, reply in self.done.items() if reply.values_N is not None}
        return flat | {
            f"{number}/notes": torch.tensor(list(json.dumps(reply.notes).encode()), dtype=torch.uint8)
            for number, reply in self.done.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; what was given for other sums is forgotten."""
        self._given, self._waiting = {}, {}
        self.done = {
            int(entry.removesuffix("/notes")): SumReply(
                state.get(entry.removesuffix("notes") + "values"), json.loads(bytes(value.tolist()))
            )
            for entry, value in state.items()
            if entry.endswith("/notes")
        }


def _added(given: Mapping[str, SumRequest]) -> SumReply:
    values = [request.values_N for request in given.values() if request.values_N is not None]
    total = torch.stack(values).sum(0) if values else None  # int64 wraps around, as integers modulo 2⁶⁴ do
    return SumReply(total, {client: request.note for client, request in given.items()})


def _shape(request: SumRequest) -> torch.Size | None:
    return None if request.values_N is None else request.values_N.shape
