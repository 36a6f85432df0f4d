"""One asyncio loop in a thread of its own, for all gRPC streams of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from flexp.errors import LinkError, LinkLostError
from flexp.links.frames import CHUNK, Frame, Head, Incoming
from flexp.rng import current_turn, resting

Value = TypeVar("Value")

METHOD = "Exchange"
SERVICE = "flexp.Link"

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", CHUNK),
    ("grpc.max_send_message_length", CHUNK),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_time_ms", 30_000),  # a side that vanished without a word is noticed within a minute
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # two servers on one port are a mistake
]
"""What both sides ask of gRPC; each uses what is meant for it."""

CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *OPTIONS,
    ("grpc.service_config", '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}'),
]
"""What a client asks of it: of a name's addresses any, and with all of a link's calls, since a server has state."""

SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.server_handshake_timeout_ms", 10_000),  # whoever connects and says nothing is let go
    ("grpc.max_connection_idle_ms", 60_000),  # and whoever has no stream
]
"""What a server asks of it."""

LOOK_SECONDS = 1.0
"""How often it is looked whether a deadline has changed."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background() -> asyncio.AbstractEventLoop:
    """The loop, started when it is first asked for; it ends with the process."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="flexp-links", daemon=True).start()
        return _loop


def wait_for(work: Coroutine[Any, Any, Value]) -> Value:
    """Run ``work`` on the loop and wait for it, in any other thread; the caller's random numbers rest meanwhile."""
    with resting(current_turn()):
        return asyncio.run_coroutine_threadsafe(work, background()).result()


async def read_frame(
    read: Callable[[], Awaitable[Any]],
    end: object,
    check: Callable[[Head], None],
    reserve: Callable[[int], Awaitable[None]] | None = None,
    deadline: Deadline | None = None,
) -> Frame | None:
    """The next frame of a stream, or ``None`` at its end.

    Args:
        read: gives the next message, or ``end``.
        check: refuses a head; called before anything is allocated.
        reserve: waits for room for so many bytes.
        deadline: when the rest of a frame must be there.

    Raises:
        LinkError: what arrives is no frame, or is refused, or ends in its middle.
    """
    message = await read()
    if message is end:
        return None
    with _damaged():
        incoming = Incoming(message)
    check(incoming.head)
    if reserve is not None:
        await reserve(incoming.head.payload)
    incoming.allocate()
    began = time.monotonic()
    while not incoming.done:
        if deadline is None:
            message = await read()
        else:
            message = await in_time(
                read(), deadline, incoming.head.payload, began, "the rest of a frame did not arrive"
            )
        if message is end:
            raise LinkError("the stream ended in the middle of a frame")
        with _damaged():
            incoming.add(message)
    return incoming.frame()


@dataclass(frozen=True)
class Deadline:
    """How long a frame may take, and its messages.

    Attributes:
        pause: seconds between two messages.
        whole: seconds that a frame of so many bytes may take in all; it may change meanwhile.
    """

    pause: float
    whole: Callable[[int], float]


async def in_time(work: Awaitable[Value], deadline: Deadline, size: int, began: float, what: str) -> Value:
    """What ``work`` gives: one message of a frame of ``size`` bytes that began at ``began``, of the monotonic clock.

    Raises:
        LinkLostError: the pause or the whole frame takes too long; it says ``what``.
    """
    task, since = asyncio.ensure_future(work), time.monotonic()
    try:
        while True:
            whole = deadline.whole(size)
            left = min(since + deadline.pause, began + whole) - time.monotonic()
            if left <= 0:
                seconds = whole if began + whole < since + deadline.pause else deadline.pause
                raise LinkLostError(f"{what} within {seconds:g} s")
            if (await asyncio.wait({task}, timeout=min(left, LOOK_SECONDS)))[0]:
                return task.result()
    finally:
        task.cancel()


@contextmanager
def _damaged() -> Iterator[None]:
    """What is no frame was damaged on its way, as nothing else comes from who was let in: trying again may help."""
    try:
        yield
    except LinkError as error:
        raise LinkLostError(str(error)) from error


@asynccontextmanager
async def within(seconds: float | None, what: str) -> AsyncIterator[None]:
    """Raise a LinkLostError that says ``what`` if the ``with`` block takes longer than ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise LinkLostError(f"{what} within {seconds:g} s") from error
