"""When a request is answered, and with whom: at once, in line for room or a version of the weights, together with
others, or when the servers further on have answered."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial, singledispatchmethod
from typing import Any, Protocol, TypeVar, cast

from flexp.config import ServerConfig
from flexp.errors import LinkError, LinkLostError, StoppedError
from flexp.links.declaring import Request, size
from flexp.links.messages import BackwardRequest, ForwardReply, ForwardRequest, KeptForwardRequest, Order, Ready
from flexp.links.packing import Places, arrived
from flexp.models.stage import Stage
from flexp.server.checks import check_backward
from flexp.server.clients import Key
from flexp.server.line import Line, Waiting
from flexp.server.session import Session
from flexp.server.state import ServerState
from flexp.server.together import Ready as ReadyForward
from flexp.server.together import Together

R = TypeVar("R")
Steps = Generator[Future[Any], Any, R]
"""A handler that gives an answer, and on the way futures that it waits for."""
log = logging.getLogger("flexp.server")
STOPS = "the server stops; save, leave, and come again when it is back"


class Conductor(Protocol):
    """Tells clients what to do next; called between two requests."""

    def ready(self, client: str, ready: Ready) -> Future[Order]:
        """A client waits for its order; it may take as long as others take."""
        ...

    def gone(self, client: str) -> None:
        """A client has left; whatever it waited for it will ask again."""
        ...

    def dismiss(self, why: LinkError) -> None:
        """Nobody gets an order any more."""
        ...


def _unknown(self: Turns, request: Any, client: str) -> Any:
    raise LinkError(f"client {client}: this server has no answer to {type(request).__name__}")


handles = singledispatchmethod(_unknown)
"""By its type, a request's handler: a method of any of the classes that make up a server."""


class Turns(ServerState, ABC):
    """Requests as they arrive, one at a time; a subclass says what answers each.

    Attributes:
        conductor: tells clients what to do next, if this server conducts a run.
        stops: clients were told to save and leave.
        submit: runs what goes on when the servers further on have answered; :func:`flexp.run.server.run_server` does it
            in the thread that computes.
    """

    def __init__(self, stage: Stage, config: ServerConfig, *held: Any) -> None:
        super().__init__(stage, config, *held)
        self._together = Together(stage, self._sessions)
        often = min(config.hold_seconds, config.exchange_seconds)
        self._line = Line(self._sessions, often, lambda: self.submit(self._look_after_line), config.exchange_seconds)
        self.conductor: Conductor | None = None
        self.stops = False
        self.submit: Callable[[Callable[[], None]], object] = lambda work: work()

    @property
    def busy(self) -> bool:
        """Whether anybody is in line; then :meth:`work` is to be called, in the thread that computes."""
        return len(self._line.waiting) > 0

    def work(self) -> float | None:
        """Answer whoever is next in line, and those that can go along.

        Returns:
            After how many seconds to call it again; ``None``: when another request has come.
        """
        with self._lock:
            group, wait = self._together.choose(self._line.firsts())
            if not group:
                return wait
            self._line.take(group)
            one, began = group[0], time.perf_counter()
            kind = "backward" if isinstance(one.request, BackwardRequest) else "forward"
            members, tokens = self._together.members(group), [self._together.tokens(each) for each in group]
            if len(group) == 1 or not self._all_at_once(group, kind):  # of all, who has been told is told nothing more
                for other in group:
                    other.tell(partial(self._now, other.client, other.request))
            noted = kind if getattr(one.request, "train", True) else "look"
            self._together.pace.note(noted, members, tokens, time.perf_counter() - began)
            return 0.0

    def _all_at_once(self, group: Sequence[Waiting], kind: str) -> bool:
        """Whether they could be answered together; that what failed has made is let go of before they are alone."""
        try:
            (self._forwards if kind == "forward" else self._backwards)(group)
        except Exception:
            log.exception("%d requests could not be answered together, so they are one by one", len(group))
            return False
        return True

    def _line_up(self, client: str, request: Request[R]) -> Future[R]:
        """Answer a request later."""
        self._check_line(client, request)
        answer = self._line.add(client, request)
        if any(session.is_late(session.patience) for session in self._sessions.values()):
            self.submit(self._look_after_line)  # after what has come already, which may be what is missing
        return answer

    def _held_up(self) -> bool:
        """Whether somebody in line waits for what others hold."""
        in_flight, begin = self._sessions.in_flight, (ForwardRequest, KeptForwardRequest)
        return any(
            isinstance(one.request, begin) and one.request.train and not one.session.may_begin(in_flight)
            for one in self._line.firsts()
        )

    def _work_off(self) -> None:
        while self.work() == 0.0:
            pass

    def dismiss(self) -> None:
        """Tell all clients to save and leave: those that wait for something now, the others when they ask for
        something; called between two requests."""
        self.stops = True
        for waited in (self.sums, self.conductor, self._line):
            if waited is not None:
                waited.dismiss(StoppedError(STOPS))

    def _check_line(self, client: str, request: Request[Any]) -> None:
        """Refuse to keep what would wait in line, where it is more than may be kept; but what lets others go on."""
        session = self._sessions[client]
        if isinstance(request, BackwardRequest):
            if session.progress.answer(request.step, ("backward", request.exchange)) is None:
                check_backward(session, request)
            if any(
                one.client == client
                and isinstance(one.request, BackwardRequest)
                and one.request.exchange == request.exchange
                for one in self._line.waiting
            ):
                raise LinkError(f"client {client}: a backward of exchange {request.exchange} is in line already")
        elif not session.has_room(size(request), graph=False):
            raise LinkLostError(f"client {client}: too much waits in line at the server, whose server.max_kept_bytes "
                                "are full; do the step again")  # fmt: skip

    def _forwards(self, group: Sequence[Waiting]) -> None:
        """Several clients' forwards in one pass."""
        ready: list[tuple[Waiting, ForwardRequest, Places | None]] = []
        for one in group:
            with self._telling(one):
                request = cast(ForwardRequest, one.request)
                known = self._known_forward(one.session, request)
                if known is not None:
                    one.tell(partial(_same, known))
                    continue
                whole, sent = arrived(request, f"client {one.client}")
                self._check(one.session, whole, self._sessions.in_flight + len(ready))
                ready.append((one, whole, sent))
        if not ready:
            return
        began = time.perf_counter()
        with self._computing():
            replies = self._together.forward([ReadyForward(one.session, whole, sent) for one, whole, sent in ready])
        each = (time.perf_counter() - began) / len(ready)
        for (one, whole, _), reply in zip(ready, replies, strict=True):
            if whole.train:
                self._remember(one.session, whole.step, ("forward", whole.exchange), reply)
            one.tell(partial(_same, reply), each)

    def _backwards(self, group: Sequence[Waiting]) -> None:
        """Several clients' backwards in one pass; each trains the blocks in turn."""
        ready: list[tuple[Waiting, BackwardRequest]] = []
        for one in group:
            with self._telling(one):
                request = cast(BackwardRequest, one.request)
                check_backward(one.session, request)
                ready.append((one, request))
        if not ready:
            return
        began = time.perf_counter()
        with self._computing():
            replies = self._together.backward([(one.session, request) for one, request in ready])
        each = (time.perf_counter() - began) / len(ready)
        for (one, request), reply in zip(ready, replies, strict=True):
            with self._telling(one):
                if isinstance(reply, Exception):
                    raise reply
                self._remember(one.session, request.step, ("backward", request.exchange), reply)
                one.tell(partial(_same, reply), each)
        self._used(one.client for one, _ in ready)

    @contextmanager
    def _telling(self, one: Waiting) -> Iterator[None]:
        """Count a request that is answered with others, and tell its client alone what it is refused for."""
        try:
            with self.guard.request(one.client):
                yield
        except Exception as error:
            one.tell(partial(_raise, error))

    def _look_after_line(self) -> None:
        """While forwards wait nobody else may come, whose request would do this."""
        with self._lock:
            self._drop_late()
            self._work_off()
            self._line.watch()

    def _next_order(self, client: str, request: Ready) -> Future[Order]:
        if self.conductor is None:
            raise LinkError("this server conducts no run")
        return self.conductor.ready(client, request)

    _handle = handles

    @abstractmethod
    def _now(self, client: str, request: Request[Any]) -> Any:
        """Answer a request, whoever waits; of a handler that waits for the servers further on, a future."""

    @abstractmethod
    def _computing(self) -> AbstractContextManager[None]:
        """What is computed inside the ``with`` block is a request's."""

    @abstractmethod
    def _remember(self, session: Session, step: int, key: Key, reply: Any) -> None:
        """Keep an answer for whoever asks again."""

    @abstractmethod
    def _drop_late(self) -> None:
        """Give up what is in flight for too long."""

    @abstractmethod
    def _known_forward(self, session: Session, request: ForwardRequest) -> ForwardReply | None:
        """What was answered to it, if it comes again and its step was applied."""

    @abstractmethod
    def _check(self, session: Session, request: ForwardRequest, in_flight: int) -> None:
        """Refuse a forward that may not be computed."""


def _same(value: Any) -> Any:
    return value


def _raise(error: Exception) -> Any:
    raise error
