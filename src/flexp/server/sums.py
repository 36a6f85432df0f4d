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
from flexp.links.asking import PIECE, PIECES, SumReply, SumRequest

MOST = 8
"""Sums of a run that stay: two meetings with three each, and two in which clients agree on a key."""
LARGEST = PIECE + 1
"""Numbers of a piece: those of the weights, and the share."""


class SumTable:
    """The sums of one run by their numbers: integers modulo 2⁶⁴, in which nothing need be readable here.

    A sum stays: who asks again, after a broken link or a snapshot, gets it again, whatever it gives the second time. Of
    averages those of the last rounds stay, in memory alone: with the server, everybody goes back.

    Attributes:
        clients: who may give something; nobody: nothing is summed.
        done: what is known already.
        first: the first round whose average can still be had.
        asked: of which round each client was asked to give the average: nobody runs ahead, or fills more than a piece.
    """

    def __init__(self) -> None:
        self.clients: tuple[str, ...] = ()
        self.done: dict[int, SumReply] = {}
        self.first = 1
        self.asked: dict[str, int] = {}
        self._rounds, self._keep = 0, 1
        self._at: dict[str, int] = {}  # the sum that a client gave to last
        self._seconds: float | None = None
        self._late: set[str] = set()  # who was not there the last time, and is waited for no more
        self._lock = threading.RLock()  # whoever closes a sum does it in a thread of its own
        self._given: dict[int, dict[str, SumRequest]] = {}
        self._waiting: dict[int, dict[str, Future[SumReply]]] = {}

    def open(self, clients: Iterable[str], seconds: float | None = None, rounds: int = 0, keep: int = 1) -> None:
        """Add up what these give from now on; ``seconds`` after the first of them has given, without the others.

        Args:
            rounds: that end with an average, of which the last ``keep`` stay.
        """
        self.clients, self._seconds, self._late = tuple(clients), seconds, set()
        self._rounds, self._keep = rounds, keep

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
                f"client {client} gives a sum, and this run has none of its: set method.name, method.meet.on and "
                "model.head in the server's configuration as well"
            )
        of, piece = divmod(number, PIECES)
        if of > self._rounds or (not of and number >= MOST):
            raise LinkError(f"client {client} gives sum {number}: this run has {MOST}, and averages of {self._rounds} "
                            "rounds")  # fmt: skip
        if of and of != self.asked.get(client):
            raise LinkError(f"client {client} gives to the average of round {of}, and was asked for another or none")
        if 0 < of < self.first:
            raise LinkError(
                f"client {client} goes back to round {of}, and averages are kept of the rounds from {self.first} on: "
                "give it a newer snapshot, or begin the run anew"
            )
        if number in self.done:
            answer.set_result(self.done[number])
            return answer
        if of and not (piece == 0 or number - 1 in self.done):
            raise LinkError(f"client {client} gives piece {piece} of round {of} before the one before is there")
        if of and request.values_N is not None and request.values_N.numel() > LARGEST:
            raise LinkError(f"client {client} gives {request.values_N.numel()} numbers at once, and a piece of an "
                            f"average has {LARGEST} at most")  # fmt: skip
        new, given = number not in self._given, self._given.setdefault(number, {})
        if new and self._seconds is not None:
            timer = threading.Timer(self._seconds, self._wait_no_more, [number, given])
            timer.daemon = True
            timer.start()
        if any(_shape(other) != _shape(request) for other in given.values()):
            raise LinkError(f"client {client} gives sums of other shapes than others: set the same [method.meet]")
        given[client] = request
        self._late.discard(client)
        self._waiting.setdefault(number, {})[client] = answer
        self._at[client] = number
        for other in sorted(self._given):  # who is at a later piece gives nothing to an earlier one any more
            past = {name for name, at in self._at.items() if other >= PIECES and at > other}
            if all(name in self._given[other] for name in self.clients if name not in self._late | past):
                self._close(other)
        return answer

    def _wait_no_more(self, number: int, given: Mapping[str, SumRequest]) -> None:
        with self._lock:
            if given and self._given.get(number) is given:  # it was not begun anew since
                self._late |= set(self.clients) - set(given)
                self._close(number)

    def _close(self, number: int) -> None:
        reply = self.done[number] = _added(self._given.pop(number))
        self.first = max(self.first, number // PIECES + 1 - self._keep)
        for old in [one for one in self.done if 0 < one // PIECES < self.first and one != number]:
            del self.done[old]
        for future in self._waiting.pop(number).values():
            if future.set_running_or_notify_cancel():
                future.set_result(reply)

    def dismiss(self, why: LinkError) -> None:
        """Nobody waits any more, nor are their numbers kept."""
        with self._lock:
            waiting = [future for futures in self._waiting.values() for future in futures.values()]
            self._given, self._waiting = {}, {}
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(why)

    def state(self) -> dict[str, Tensor]:
        """The sums that stay, flat."""
        stay = {number: reply for number, reply in self.done.items() if number < PIECES}
        flat = {f"{number}/values": reply.values_N for number, reply in stay.items() if reply.values_N is not None}
        return flat | {
            f"{number}/notes": torch.tensor(list(json.dumps(reply.notes).encode()), dtype=torch.uint8)
            for number, reply in stay.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; what was given for other sums is forgotten."""
        self._given, self._waiting, self._at, self.first = {}, {}, {}, 1
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
