"""The line of requests that are answered later: forwards that wait until others are through
(``server.max_in_flight_total``) or an old version of the shared weights is let go (``server.max_versions``), and with
``server.joined`` all that may go through the blocks together."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flexp.errors import LinkError, LinkLostError
from flexp.links.base import Later
from flexp.links.declaring import Request, size
from flexp.server.kept import Sessions
from flexp.server.session import Session

GIVEN_UP = "the step was given up while its request waited; do the step again"
BUSY = "others took what its request has waited for, for more than {:g} s (server.exchange_seconds); do the step again"


@dataclass(eq=False)
class Waiting:
    """A request that is answered later, of a client's session as it was when the request came."""

    client: str
    request: Request[Any]
    session: Session
    drops: int
    answer: Later[Any] = field(default_factory=Later)
    since: float = field(default_factory=time.monotonic)

    def tell(self, make: Callable[[], Any], seconds: float = 0.0) -> None:
        """The answer is what ``make`` gives or raises; ``seconds``: that were needed before."""
        if self.answer.done() or not self.answer.set_running_or_notify_cancel():
            return
        began = time.perf_counter() - seconds
        try:
            value = make()
            if isinstance(value, Future):  # the servers further on have not answered yet
                value.add_done_callback(self._handed)
                return
            self.answer.seconds = time.perf_counter() - began
            self.answer.set_result(value)
        except Exception as error:
            self.answer.set_exception(error)

    def _handed(self, done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            self.answer.set_result(done.result())
        else:
            self.answer.set_exception(error)


class Line:
    """First in, first out. Who waits for room or for a version holds nothing, so who holds something waits for nobody.

    Args:
        sessions: of the server. A request whose client has left, joined anew or given up waits no more.
        seconds, late: the latter is called in a thread of its own, so long after the first came, for as long as anybody
            waits.
        most: seconds that a request waits at most.

    Attributes:
        waiting: all, in their order; a step for which nobody waits asks this and nothing else.
    """

    def __init__(self, sessions: Sessions, seconds: float, late: Callable[[], object], most: float) -> None:
        self._sessions, self._seconds, self._late, self._most = sessions, seconds, late, most
        self.waiting: deque[Waiting] = deque()
        self._watched = False

    def add(self, client: str, request: Request[Any]) -> Later[Any]:
        """Let a request wait; gives its answer to be."""
        session = self._sessions[client]
        session.lined += size(request)
        self.waiting.append(Waiting(client, request, session, session.drops))
        self.watch()
        return self.waiting[-1].answer

    def watch(self) -> None:
        """See to it that whoever holds up the line is not waited for for ever."""
        if self.waiting and not self._watched:
            self._watched = True
            timer = threading.Timer(self._seconds, _look, [weakref.ref(self)])  # which keeps no server that has ended
            timer.daemon = True
            timer.start()

    def look(self) -> None:
        """Time is up for whoever holds up the line."""
        self._watched = False
        self._late()

    def firsts(self) -> list[Waiting]:
        """Of each client the request that came first; those that wait for nothing any more are told so."""
        oldest = time.monotonic() - self._most
        for one in list(self.waiting):
            if self._sessions.get(one.client) is not one.session or one.session.drops != one.drops:
                self.take([one])
                one.tell(_raising(LinkLostError(f"client {one.client}: {GIVEN_UP}")))
            elif one.since < oldest:
                self.take([one])
                one.tell(_raising(LinkLostError(f"client {one.client}: {BUSY.format(self._most)}")))
        firsts: dict[str, Waiting] = {}
        for one in self.waiting:
            firsts.setdefault(one.client, one)
        return list(firsts.values())

    def take(self, group: Sequence[Waiting]) -> None:
        """These wait no more."""
        for one in group:
            self.waiting.remove(one)
            one.session.lined -= size(one.request)

    def dismiss(self, why: LinkError) -> None:
        """Nobody waits any more."""
        for one in list(self.waiting):
            self.take([one])
            one.tell(_raising(why))


def _raising(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def _look(line: weakref.ref[Line]) -> None:
    found = line()
    if found is not None:
        found.look()
