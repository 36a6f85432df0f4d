"""What clients add up through the server: it keeps what each gives, and answers when all have given theirs, or when
those that are late have been waited for long enough."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future

import torch

from flexp.errors import LinkError, LinkLostError, StorageError
from flexp.links.asking import KEYS, OF_A_MEETING, PIECE, PIECES, SEALED, SumReply, SumRequest
from flexp.links.messages import AGAIN
from flexp.server.journal import Journal

MOST = 8
"""Sums of a run that stay: two meetings with three each, and two in which clients agree on a key."""
LARGEST = PIECE + 1
"""Numbers of a piece: those of the weights, and the share."""


class SumTable:
    """The sums of one run by their numbers: integers modulo 2⁶⁴, in which nothing need be readable here.

    A sum stays: who asks again, after a broken link or a snapshot, gets it again, whatever it gives the second time. Of
    averages those of the last rounds stay. A sum is in the journal before anybody has it, so whoever is past it, it can
    be had again, also when all were killed.

    Attributes:
        clients: who may give something; nobody: nothing is summed.
        done: what is known already; ``None``: it is long, and in the journal.
        first: the first round whose average can still be had.
        asked: of which round each client was asked to give the average: nobody runs ahead, or fills more than a piece.
    """

    def __init__(self) -> None:
        self.clients: tuple[str, ...] = ()
        self.done: dict[int, SumReply | None] = {}
        self.first = 1
        self.asked: dict[str, int] = {}
        self._rounds, self._keep = 0, 1
        self._journal: Journal | None = None
        self._past: dict[str, frozenset[int]] = {}  # what a client gives nothing to any more (:func:`_kind`)
        self._seconds: float | None = None
        self._late: set[str] = set()  # who was not there the last time, and is waited for no more
        self._lock = threading.RLock()  # whoever closes a sum does it in a thread of its own
        self._given: dict[int, dict[str, SumRequest]] = {}
        self._waiting: dict[int, dict[str, Future[SumReply]]] = {}

    def open(
        self,
        clients: Iterable[str],
        seconds: float | None = None,
        rounds: int = 0,
        keep: int = 1,
        journal: Journal | None = None,
    ) -> None:
        """Add up what these give from now on; ``seconds`` after the first of them has given, without the others.

        Args:
            rounds: that end with an average, of which the last ``keep`` stay.
            journal: has those from before the server fell, and keeps what comes; ``None``: they are in memory alone.

        Raises:
            StorageError: a sum of a meeting is damaged.
        """
        self.clients, self._seconds, self._late = tuple(clients), seconds, set()
        self._rounds, self._keep, self._journal = rounds, keep, journal
        if journal is not None:
            self.done = {number: journal.read(number) if number < PIECES else None for number in journal.numbers}
            there = {number // PIECES for number in self.done} - {0}
            while there:  # of the last ones without a gap
                self.first = max(there)
                there = {self.first - 1} & there

    def past(self, client: str, places: Iterable[tuple[str, int]]) -> None:
        """A client was at these meetings and averages (``what``, ``number``), and gives nothing to them any more: who
        waits for it in a sum that is lost waits in vain, and is told. One that came when the others had agreed on their
        key met nobody, and says nothing of their sums."""
        with self._lock:
            agreed = self.done.get(KEYS)
            met = places if agreed is None or client in agreed.notes else []
            self._past[client] = frozenset(number for place in met for number in _sums_of(*place))
            lost = [number for number in self._given if _kind(number) in self._past[client]]
            for number in lost:
                del self._given[number]
            waiting = [(number, *one) for number in lost for one in self._waiting.pop(number).items()]
        for number, name, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_lost(name, number))

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
            answer.set_result(self._known(number))
            return answer
        if any(_kind(number) in past for name, past in self._past.items() if name != client):
            raise _lost(client, number)
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
        waiting = self._waiting.setdefault(number, {})
        earlier, waiting[client] = waiting.get(client), answer
        if earlier is not None and earlier.set_running_or_notify_cancel():
            earlier.set_exception(LinkLostError(AGAIN))
        for other in sorted(self._given):  # of one more it may be known by now that it is waited for no more
            if all(name in self._given[other] for name in self.clients if name not in self._late):
                self._close(other)
        return answer

    def _wait_no_more(self, number: int, given: Mapping[str, SumRequest]) -> None:
        with self._lock:
            if given and self._given.get(number) is given:  # it was not begun anew since
                self._late |= set(self.clients) - set(given)
                self._close(number)

    def _close(self, number: int) -> None:
        reply = self.done[number] = _added(self._given.pop(number))
        if self._journal is not None and self._journal.write(number, reply) and number >= PIECES:
            self.done[number] = None
        self._drop_old(number)
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

    def _known(self, number: int) -> SumReply:
        reply = self.done[number]
        if reply is None:
            assert self._journal is not None
            try:
                reply = self._journal.read(number)
            except StorageError as error:
                raise LinkError(f"sum {number} is lost: {error}") from error
        return reply

    def _drop_old(self, newest: int) -> None:
        self.first = max(self.first, newest // PIECES + 1 - self._keep)
        for old in [one for one in self.done if 0 < one // PIECES < self.first and one != newest]:
            del self.done[old]
            if self._journal is not None:
                self._journal.forget(old)


def _kind(number: int) -> int:
    """A sum of a meeting by its number; of an average by its round, negative."""
    return -(number // PIECES) or number


def _sums_of(what: str, number: int) -> list[int]:
    """Those of a meeting or an average, with those in which clients agreed on a key before it."""
    if what == "average":
        return [-number, KEYS, SEALED]
    return [*range(OF_A_MEETING * number, OF_A_MEETING * (number + 1)), KEYS, SEALED]


def _lost(client: str, number: int) -> LinkError:
    of = number // PIECES
    what = f"average of round {of}" if of else "sums of a meeting" if number < KEYS else "key of the group"
    return LinkError(
        f"client {client} has no {what}, which others went on from, and the server has lost it: give it a newer "
        "snapshot, or begin the run anew"
    )


def _added(given: Mapping[str, SumRequest]) -> SumReply:
    values = [request.values_N for request in given.values() if request.values_N is not None]
    total = torch.stack(values).sum(0) if values else None  # int64 wraps around, as integers modulo 2⁶⁴ do
    return SumReply(total, {client: request.note for client, request in given.items()})


def _shape(request: SumRequest) -> torch.Size | None:
    return None if request.values_N is None else request.values_N.shape
