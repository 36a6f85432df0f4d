"""A slow, shaky network around any link: latency, jitter, bandwidth each way, and connections that break.

Requests overlap as on a real link: a call gives a future at once, its bytes queue for the uplink, the server works on
requests in the order in which they arrive, and answers queue for the downlink. Sizes are those of tensors as they
cross, after the codec. Chance is drawn from a seed, in the order of the messages of each direction.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from flexp.errors import LinkError, LinkLostError
from flexp.links.base import Link, Wrapping
from flexp.links.coding import Coding
from flexp.links.messages import Join, Request
from flexp.links.translate import dtype_of
from flexp.rng import current_turn, resting

R = TypeVar("R")


@dataclass(frozen=True)
class Network:
    """What lies between a client and its server.

    Attributes:
        latency_s: seconds that a message takes one way, besides its bytes: half a round trip.
        jitter_s: at most so much more, drawn for each message; none overtakes another.
        uplink_bps, downlink_bps: bits a second; ``None``: any number.
        loss: the probability that the connection breaks with a message.
        seed: of jitter and loss.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    uplink_bps: float | None = None
    downlink_bps: float | None = None
    loss: float = 0.0
    seed: int = 0


class Line:
    """One direction of a network: bytes leave one after the other and arrive in order."""

    def __init__(self, network: Network, bps: float | None, name: str) -> None:
        self._network, self._bps = network, bps
        self._random = random.Random(f"{network.seed} {name}")
        self._free = self._last = -math.inf

    def arrival(self, now: float, size: int) -> float | None:
        """When a message of ``size`` bytes that is sent at ``now`` has arrived; ``None``: it breaks the connection."""
        lost = self._random.random() < self._network.loss
        late = self._random.uniform(0.0, self._network.jitter_s)
        self._free = max(now, self._free) + (8 * size / self._bps if self._bps else 0.0)
        self._last = max(self._last, self._free + self._network.latency_s + late)
        return None if lost else self._last


class EmulatedLink(Wrapping):
    """``inner`` behind a network.

    A connection that broke has no effect at the server any more; the client may join anew, if ``inner`` can.
    """

    def __init__(self, inner: Link, network: Network) -> None:
        super().__init__(inner)
        self.network = network
        self._lock = threading.RLock()
        self._clock = _Clock()
        self._server = ThreadPoolExecutor(1, "flexp-emulated-server")
        self._coding: Coding | None = None
        self._broken: str | None = None
        self._open: set[Future[Any]] = set()
        self._begin()

    def call(self, request: Request[R]) -> Future[R]:
        future: Future[R] = Future()
        with self._lock:
            if isinstance(request, Join) and self._broken == LOST:
                self._begin()
            if self._broken is not None:
                future.set_exception(self._error(self._broken))
                return future
            self._open.add(future)
            self._travel(self._up, request, future, lambda: self._server.submit(self._arrived, request, future))
        return future

    def close(self) -> None:
        self._break("the link is closed")
        with resting(current_turn()):
            self._server.shutdown()
        self._clock.stop()

    def lose(self) -> None:
        """Break the connection now: what is under way fails, and the server forgets it."""
        self._break(LOST)

    def _begin(self) -> None:
        self._broken = None
        self._up = Line(self.network, self.network.uplink_bps, "up")
        self._down = Line(self.network, self.network.downlink_bps, "down")

    def _arrived(self, request: Request[Any], future: Future[Any]) -> None:
        if not future.done():  # else the connection broke while this waited for the server
            self.inner.call(request).add_done_callback(lambda answer: self._answered(request, answer, future))

    def _answered(self, request: Request[Any], answer: Future[Any], future: Future[Any]) -> None:
        def deliver() -> None:
            with self._lock, suppress(InvalidStateError):  # it may have failed meanwhile
                self._open.discard(future)
                error = answer.exception()
                if error is not None:
                    future.set_exception(error)
                    return
                if isinstance(request, Join):
                    codec = request.codec or getattr(self.inner, "codec", None)
                    self._coding = Coding(codec, dtype_of(request), answer.result().hidden)
                future.set_result(answer.result())

        with self._lock:
            if not future.done():
                self._travel(self._down, None if answer.exception() else answer.result(), future, deliver)

    def _travel(self, line: Line, message: Any, future: Future[Any], arrive: Callable[[], Any]) -> None:
        size = 0 if self._coding is None or message is None else self._coding.size(message)
        when = line.arrival(time.monotonic(), size)
        if when is None:
            self.lose()
        else:
            self._clock.at(when, lambda: None if future.done() else arrive())

    def _break(self, why: str) -> None:
        with self._lock:
            if self._broken is not None:
                return
            self._broken = why
            self._server.submit(self.inner.close)  # after what it computes at this moment
            waiting, self._open = self._open, set()
            for future in waiting:
                future.set_exception(self._error(why))

    def _error(self, why: str) -> LinkError:
        return (LinkLostError if why == LOST else LinkError)(f"client {self.client}: {why}")


LOST = "the emulated network lost the connection"


class _Clock:
    """Runs actions at their times, in a thread of its own."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], Any]]] = []
        self._number = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        threading.Thread(target=self._run, name="flexp-emulated-network", daemon=True).start()

    def at(self, when: float, action: Callable[[], Any]) -> None:
        with self._changed:
            heapq.heappush(self._due, (when, next(self._number), action))
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._stopped:
                    return
                _, _, action = heapq.heappop(self._due)
            action()
