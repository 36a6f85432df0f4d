"""The line of forwards that wait for an old version of the shared weights to be let go (``server.max_versions``)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flexp.errors import LinkError, LinkLostError
from flexp.links.declaring import Request
from flexp.server.session import Session, Sessions

GIVEN_UP = "the step was given up while its forward waited; do the step again"


@dataclass
class Waiting:
    """A request that is answered later, of a client's session as it was when the request came."""

    client: str
    request: Request[Any]
    session: Session
    drops: int
    answer: Future[Any] = field(default_factory=Future)


class Line:
    """First in, first out. Whoever waits holds no weights, so whoever holds some waits for nobody, and lets them go.

    Args:
        sessions: of the server. A request whose client has left, joined anew or given up waits no more.
        late: called in a thread of its own, ``seconds`` after the first came, for as long as anybody waits.
    """

    def __init__(self, sessions: Sessions, seconds: float, late: Callable[[], None]) -> None:
        self._sessions, self._seconds, self._late = sessions, seconds, late
        self._waiting: deque[Waiting] = deque()
        self._watched = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, client: str, request: Request[Any]) -> Future[Any]:
        """Let a request wait; gives its answer to be."""
        session = self._sessions[client]
        self._waiting.append(Waiting(client, request, session, session.drops))
        self.watch()
        return self._waiting[-1].answer

    def watch(self) -> None:
        """See to it that whoever holds up the line is not waited for for ever."""
        if self._waiting and not self._watched:
            self._watched = True
            timer = threading.Timer(self._seconds, self._look)
            timer.daemon = True
            timer.start()

    def first(self) -> Waiting | None:
        """Who is next; those that wait for nothing any more are told so first."""
        stale = [one for one in self._waiting if self._sessions.get(one.client) is not one.session
                 or one.session.drops != one.drops]  # fmt: skip
        for one in stale:
            self._waiting.remove(one)
            _tell(one, LinkLostError(f"client {one.client}: {GIVEN_UP}"))
        return self._waiting[0] if self._waiting else None

    def serve(self, answer: Callable[[str, Request[Any]], Any]) -> None:
        """Answer the first."""
        one = self._waiting.popleft()
        if not one.answer.set_running_or_notify_cancel():
            return
        try:
            made = answer(one.client, one.request)
        except Exception as error:
            one.answer.set_exception(error)
            return
        if isinstance(made, Future):  # the servers further on have not answered yet
            made.add_done_callback(lambda done: hand_on(done, one.answer))
        else:
            one.answer.set_result(made)

    def dismiss(self, why: LinkError) -> None:
        """Nobody waits any more."""
        while self._waiting:
            _tell(self._waiting.popleft(), why)

    def _look(self) -> None:
        self._watched = False
        self._late()


def hand_on(done: Future[Any], answer: Future[Any]) -> None:
    """Let a future have what another one has."""
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    else:
        answer.set_exception(error)


def _tell(one: Waiting, why: LinkError) -> None:
    if one.answer.set_running_or_notify_cancel():
        one.answer.set_exception(why)
