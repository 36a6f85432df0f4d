"""A slow, shaky network around any link: latency, jitter, bandwidth each way, and connections that break.

Requests overlap as on a real link: a call gives a future at once, its bytes queue for the uplink, the server works on
requests in the order in which they arrive, and answers queue for the downlink. An urgent request leaves before others
that wait, as it does over gRPC. Sizes are those of tensors as they cross, after the codec. Chance is drawn from a seed,
in the order of the messages of each direction.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from flexp.errors import ConfigError, LinkError, LinkLostError
from flexp.links.base import Link, in_place_of, waiting_thread
from flexp.links.coding import Coding
from flexp.links.declaring import Request
from flexp.links.messages import Join
from flexp.links.rules import dtype_of
from flexp.links.wrapping import Wrapping
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
        self.free = self._last = -math.inf  # when the last byte has left

    def arrival(self, now: float, size: int) -> float | None:
        """When a message of ``size`` bytes that is sent at ``now`` has arrived; ``None``: it breaks the connection."""
        lost = self._random.random() < self._network.loss
        late = self._random.uniform(0.0, self._network.jitter_s)
        self.free = max(now, self.free) + (8 * size / self._bps if self._bps else 0.0)
        self._last = max(self._last, self.free + self._network.latency_s + late)
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
        self._number = itertools.count()
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
            heapq.heappush(self._waiting, (not request.urgent, next(self._number), request, future, waiting_thread()))
            self._leave(self._up)
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
        self._waiting: list[tuple[bool, int, Request[Any], Future[Any], int | None]] = []
        self._up = Line(self.network, self.network.uplink_bps, "up")
        self._down = Line(self.network, self.network.downlink_bps, "down")

    def _leave(self, line: Line) -> None:
        """Send what waits for the uplink, as far as that is free."""
        with self._lock:
            while self._waiting and line is self._up and line.free <= time.monotonic():
                _, _, request, future, thread = heapq.heappop(self._waiting)
                arrive = partial(self._server.submit, self._arrived, request, future, thread)
                self._travel(line, request, future, arrive)
                if line.free > time.monotonic():
                    self._clock.at(line.free, lambda: self._leave(line))

    def _arrived(self, request: Request[Any], future: Future[Any], thread: int | None) -> None:
        if not future.done():  # else the connection broke while this waited for the server
            with in_place_of(thread):
                answer = self.inner.call(request)
            answer.add_done_callback(lambda answer: self._answered(request, answer, future))

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


_UNITS = {"s": 1.0, "ms": 1e-3, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_KEYS = {
    "latency": ("latency_s", ("s", "ms")),
    "jitter": ("jitter_s", ("s", "ms")),
    "up": ("uplink_bps", ("bit", "kbit", "mbit", "gbit")),
    "down": ("downlink_bps", ("bit", "kbit", "mbit", "gbit")),
    "loss": ("loss", ("",)),
    "seed": ("seed", ("",)),
}


def split_url(url: str) -> tuple[str, Network | None]:
    """A URL without its query, and the network that the query describes, if there is one.

    ``latency`` (one way) and ``jitter`` in s or ms, ``up`` and ``down`` in bit, kbit, mbit or gbit a second, ``loss``
    as a probability of each message, ``seed`` as a whole number.

    Raises:
        ConfigError: a key or a value is none of these.
    """
    address, asked, query = url.partition("?")
    if not asked:
        return url, None
    values: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in _KEYS:
            raise ConfigError(f"the link's network has no {key!r}; expected {', '.join(_KEYS)}")
        name, units = _KEYS[key]
        values[name] = _value(key, text, units)
    return address, Network(**values)


def _value(key: str, text: str, units: tuple[str, ...]) -> float | int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]*)", text)
    value = float(match[1]) * _UNITS.get(match[2], 1.0) if match and match[2] in units else math.nan
    if key == "seed" and value == value and value.is_integer():
        return int(value)
    if not value >= 0 or key == "seed" or (key == "loss" and value > 1) or (key in ("up", "down") and not value):
        what = {"loss": "a probability", "seed": "a whole number"}.get(key, f"a number with {' or '.join(units)}")
        raise ConfigError(f"the link's network has {key} = {text!r}, expected {what}, as in {_EXAMPLES[key]}")
    return value


_EXAMPLES = {
    "latency": "latency=25ms", "jitter": "jitter=5ms", "up": "up=20mbit", "down": "down=20mbit", "loss": "loss=0.001",
    "seed": "seed=1",
}  # fmt: skip
