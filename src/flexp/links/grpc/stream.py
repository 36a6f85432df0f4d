"""One client's stream at the server: its frames are read, checked and handed on; answers go back in order."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import torch

from flexp.errors import LinkError, LinkLostError
from flexp.links.coding import PLAIN
from flexp.links.frames import Frame, Head, encode
from flexp.links.grpc.loop import Deadline, in_time, read_frame, within
from flexp.links.messages import Join, Leave, Refusal, Welcome
from flexp.links.rules import Agreement, Limits, check_request

Answer = tuple[Welcome | Refusal | None, list[bytes]]
"""What carries an answer over the stream, which holds it for a while: of the answer itself only what has no tensors."""
Compute = Callable[[str, Frame, Callable[[], None]], "asyncio.Future[Answer]"]
LATE = "a request came after one that was sent later, so its step must be done again"
GAPS_KEPT = 64
SHARES = 32
"""Of so many clients at least each has a share of half of the memory."""


class Stream:
    """Reads requests while earlier ones are computed, up to ``limits.unanswered`` of them.

    Args:
        compute: puts a request in the queue of the thread that computes; gives its answer, encoded. The service, if it
            keeps the request meanwhile, counts it: then its memory here is given back.
        rates: how fast clients may send.

    Attributes:
        refused: it asked to join, and may not; it could ask again, and gives way to another stream of the same client.
    """

    def __init__(
        self, client: str, context: Any, limits: Limits, memory: Memory, compute: Compute, rates: Rates | None = None
    ) -> None:
        self.refused = False
        self._client, self._context, self._limits = client, context, limits
        self._memory, self._compute = memory, compute
        self._rates = rates or Rates(limits)
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last: LinkError | None = None
        self._agreement: Agreement | None = None
        self._deadline = Deadline(limits.frame_seconds, self._seconds)
        self._numbers = Numbers()
        self._answers: asyncio.Queue[tuple[asyncio.Future[Answer], int] | None] = asyncio.Queue(limits.unanswered)
        self._held: dict[int, int] = {}  # bytes of memory, by request

    async def run(self) -> None:
        """Serve until the client leaves or vanishes, or breaks the protocol, which ends its stream."""
        tasks = {asyncio.ensure_future(self._read_all()), asyncio.ensure_future(self._write_all())}
        try:
            both = asyncio.gather(*tasks)
            both.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # whoever ends first is told
            waiting: set[asyncio.Future[Any]] = {both, self._ended}
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
                self._held.clear()
                self._memory.release(self._client)

    def end(self, why: LinkError, *, answered: bool = False) -> None:
        """End the stream: at once, or (``answered``) when all that was asked so far has its answer; on the loop."""
        if answered:
            self._last = why
        elif not self._ended.done():
            self._ended.set_exception(why)

    async def _read_all(self) -> None:
        try:
            while True:
                frame = await read_frame(self._read, grpc.aio.EOF, self._check, self._reserve, self._deadline)
                if frame is None:
                    break
                if not self._numbers.new(frame.head.call):
                    self._memory.release(self._client, frame.head.payload)
                    continue
                self._held[frame.head.call] = frame.head.payload
                answer = self._compute(self._client, frame, partial(self._release, frame.head.call))
                await self._answers.put((answer, frame.head.call))
                if frame.head.message == Join.__name__:
                    welcome, _ = await asyncio.shield(answer)
                    self.refused = isinstance(welcome, Refusal) and self._agreement is None
                    if isinstance(welcome, Welcome):
                        self._agreement = Agreement.of(PLAIN.message(frame, torch.device("cpu")), welcome)
                if frame.head.message == Leave.__name__:
                    break
                del frame  # what waits in line, and is not counted here any more, must go with its answer
        except LinkError as error:  # whoever breaks the protocol has what came before answered, and this
            last: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            last.set_result(refused(error, 0))
            await self._answers.put((last, 0))
        await self._answers.put(None)

    async def _write_all(self) -> None:
        while (item := await self._answers.get()) is not None:
            answer, call = item
            _, messages = await answer
            size, began = sum(map(len, messages)), time.monotonic()
            for message in messages:
                what = f"client {self._client} did not take its answer"
                await in_time(self._context.write(message), self._deadline, size, began, what)
            self._release(call)
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
        await self._memory.reserve(self._client, size)

    def _release(self, call: int) -> None:
        self._memory.release(self._client, self._held.pop(call, 0))

    def _seconds(self, size: int) -> float:
        """That a frame may take now: less while others wait for what it holds."""
        held_up = self._memory.waiting and self._memory.held[self._client] > self._memory.share
        return self._limits.frame_seconds if held_up else self._limits.seconds(size)


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
    """Bytes that frames of all clients may take together, from their first message until they are answered.

    Half of it is in shares, one for each client: whoever is within its share waits for nobody, whatever others announce
    and do not send. The other half is common; for that frames wait, first come, first served.

    Attributes:
        held: by the clients that hold any.
        waiting: frames that wait for room.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: Counter[str] = Counter()
        self.waiting = 0
        self._turn = asyncio.Lock()  # small frames do not starve large ones
        self._freed = asyncio.Event()

    @property
    def used(self) -> int:
        """Of all clients."""
        return self.held.total()

    @property
    def share(self) -> int:
        """What each client has for itself."""
        return self.most // 2 // max(SHARES, len(self.held))

    async def reserve(self, client: str, size: int) -> None:
        """Wait until ``size`` bytes are free for this client, and take them.

        A whole frame at once: a part of it could wait for room that other parts hold.

        Raises:
            LinkError: there will never be so many.
        """
        if size > self.most:
            raise LinkError(f"a frame of {size} bytes is more than the server's memory in flight, {self.most} bytes")
        if not (self._own(client, size) and self._free(client, size)):
            self.waiting += 1
            try:
                async with self._turn:
                    while not self._free(client, size):
                        self._freed.clear()
                        await self._freed.wait()
            finally:
                self.waiting -= 1
        self.held[client] += size

    def release(self, client: str, size: int | None = None) -> None:
        """Give back what was reserved; ``None``: all of it."""
        self.held[client] -= self.held[client] if size is None else size
        if self.held[client] <= 0:
            del self.held[client]
        self._freed.set()

    def _own(self, client: str, size: int) -> bool:
        return self.held[client] + size <= self.share

    def _free(self, client: str, size: int) -> bool:
        if self.used + size > self.most:
            return False
        after = self.held | Counter({client: self.held[client] + size})
        common = sum(max(0, own - self.share) for own in after.values())
        return self._own(client, size) or common <= self.most - self.most // 2 or not self.used


def refused(error: Exception | str, call: int) -> Answer:
    """The refusal of one request, or (``call`` = 0) of the whole stream."""
    refusal = Refusal.of(error)
    return refusal, encode(PLAIN.frame(refusal, call))
