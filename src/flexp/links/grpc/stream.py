"""One client's stream at the server: its frames are read, checked and handed on; answers go back in order."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import grpc
import torch

from flexp.errors import LinkError, LinkLostError
from flexp.links.coding import PLAIN
from flexp.links.frames import Frame, Head, encode
from flexp.links.grpc.loop import read_frame, within
from flexp.links.messages import Join, Leave, Refusal, Welcome
from flexp.links.rules import Agreement, Limits, check_request

Answer = tuple[Welcome | Refusal | None, list[bytes]]
"""What carries an answer over the stream, which holds it for a while: of the answer itself only what has no tensors."""
Compute = Callable[[str, Frame], "asyncio.Future[Answer]"]
LATE = "a request came after one that was sent later, so its step must be done again"
GAPS_KEPT = 64


class Stream:
    """Reads requests while earlier ones are computed, up to ``limits.unanswered`` of them.

    Args:
        compute: puts a request in the queue of the thread that computes; gives its answer, encoded.
        rates: how fast clients may send.
    """

    def __init__(
        self, client: str, context: Any, limits: Limits, memory: Memory, compute: Compute, rates: Rates | None = None
    ) -> None:
        self._client, self._context, self._limits = client, context, limits
        self._memory, self._compute = memory, compute
        self._rates = rates or Rates(limits)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last: LinkError | None = None
        self._agreement: Agreement | None = None
        self._held = 0  # bytes of memory
        self._numbers = Numbers()
        self._answers: asyncio.Queue[tuple[asyncio.Future[Answer], int] | None] = asyncio.Queue(limits.unanswered)

    async def run(self) -> None:
        """Serve until the client leaves or vanishes, or breaks the protocol, which ends its stream."""
        tasks = {asyncio.ensure_future(self._read_all()), asyncio.ensure_future(self._write_all())}
        try:
            waiting: set[asyncio.Future[Any]] = {asyncio.gather(*tasks), self._ended}
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failed = next((future.exception() for future in done if future.exception()), None)
            if isinstance(failed, LinkError):
                await self._context.abort(grpc.StatusCode.ABORTED, str(failed))
            if failed is not None:
                raise failed
        finally:
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # gRPC cancels the stream of a client that has gone, here as well
                self._memory.release(self._held)

    def end(self, why: LinkError, *, answered: bool = False) -> None:
        """End the stream: at once, or (``answered``) when all that was asked so far has its answer; on the loop."""
        if answered:
            self._last = why
        elif not self._ended.done():
            self._ended.set_exception(why)

    async def _read_all(self) -> None:
        try:
            while True:
                frame = await read_frame(
                    self._read, grpc.aio.EOF, self._check, self._reserve, self._limits.frame_seconds
                )
                if frame is None:
                    break
                if not self._numbers.new(frame.head.call):
                    self._held -= frame.head.payload
                    self._memory.release(frame.head.payload)
                    continue
                answer = self._compute(self._client, frame)
                await self._answers.put((answer, frame.head.payload))
                if frame.head.message == Join.__name__:
                    welcome, _ = await asyncio.shield(answer)
                    if isinstance(welcome, Welcome):
                        self._agreement = Agreement.of(PLAIN.message(frame, torch.device("cpu")), welcome)
                if frame.head.message == Leave.__name__:
                    break
        except LinkError as error:  # whoever breaks the protocol has what came before answered, and this
            last: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            last.set_result(refused(error, 0))
            await self._answers.put((last, 0))
        await self._answers.put(None)

    async def _write_all(self) -> None:
        while (item := await self._answers.get()) is not None:
            answer, held = item
            _, messages = await answer
            for message in messages:
                async with within(self._limits.frame_seconds, f"client {self._client} did not take its answer"):
                    await self._context.write(message)
            self._held -= held
            self._memory.release(held)
            if self._last is not None and self._answers.empty():
                raise self._last

    async def _read(self) -> Any:
        if self._agreement is not None:
            return await self._context.read()
        async with within(self._limits.join_seconds, f"client {self._client} connected, but did not join"):
            return await self._context.read()

    def _check(self, head: Head) -> None:
        check_request(head, self._agreement, self._client)

    async def _reserve(self, size: int) -> None:
        wait = self._rates.take(self._client, size)
        if wait > 0:
            await asyncio.sleep(wait)  # reading on later holds the sender back
        await self._memory.reserve(size)
        self._held += size


class Numbers:
    """Of one stream's requests: they rise; a client may leave some out, but none may come after a higher one.

    What comes twice is passed over. gRPC keeps the order of a stream; what stands between client and server may not.
    """

    def __init__(self) -> None:
        self._newest = 0
        self._left_out: deque[range] = deque(maxlen=GAPS_KEPT)  # a client of ours leaves out few: refused requests

    def new(self, number: int) -> bool:
        """Whether this request is to be computed; otherwise it has come before.

        Raises:
            LinkLostError: it has not, and one that was sent later has been computed.
        """
        if number > self._newest:
            if number > self._newest + 1:
                self._left_out.append(range(self._newest + 1, number))
            self._newest = number
            return True
        if any(number in gap for gap in self._left_out):
            raise LinkLostError(LATE)
        return False


class Bucket:
    """Lets ``rate`` units a second pass, and up to ``burst`` at once after a pause."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._at = burst, clock()

    def take(self, amount: float) -> float:
        """Take so many units; gives the seconds to wait first. More than a burst passes too, and is waited for."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate) - amount
        self._at = now
        return max(0.0, -self._level / self._rate)


class Rates:
    """The buckets of all clients. They outlive streams, so that connecting anew gains nothing; the oldest go first."""

    def __init__(self, limits: Limits, most: int = 4096, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._most, self._clock = limits, most, clock
        self._buckets: OrderedDict[str, list[Bucket]] = OrderedDict()

    def take(self, client: str, size: int) -> float:
        """Seconds that a request of ``size`` bytes of tensors waits before it is read on."""
        limits = self._limits
        if client not in self._buckets:
            self._buckets[client] = [
                Bucket(rate, rate * limits.burst_seconds, self._clock)
                for rate in (limits.requests_per_second, limits.bytes_per_second)
            ]
        self._buckets.move_to_end(client)
        while len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        requests, volume = self._buckets[client]
        return max(requests.take(1), volume.take(size))


class Memory:
    """Bytes that frames of all clients may take together, from their first message until they are answered."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._turn = asyncio.Lock()  # first come, first served: small frames do not starve large ones
        self._freed = asyncio.Event()

    async def reserve(self, size: int) -> None:
        """Wait until ``size`` bytes are free, and take them.

        A whole frame at once: a part of it could wait for room that other parts hold.

        Raises:
            LinkError: there will never be so many.
        """
        if size > self.most:
            raise LinkError(f"a frame of {size} bytes is more than the server's memory in flight, {self.most} bytes")
        async with self._turn:
            while self.used + size > self.most:
                self._freed.clear()
                await self._freed.wait()
            self.used += size

    def release(self, size: int) -> None:
        """Give back what was reserved."""
        self.used -= size
        self._freed.set()


def refused(error: Exception | str, call: int) -> Answer:
    """The refusal of one request, or (``call`` = 0) of the whole stream."""
    refusal = Refusal.of(error)
    return refusal, encode(PLAIN.frame(refusal, call))
