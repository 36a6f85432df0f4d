"""One client's stream at the server: its frames are read, checked and handed on; answers go back in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import torch

from flexp.errors import LinkError
from flexp.links.frames import Frame, encode
from flexp.links.grpc.loop import read_frame, within
from flexp.links.grpc.memory import Memory
from flexp.links.grpc.order import Order
from flexp.links.grpc.rate import Rates
from flexp.links.rules import Agreement, Limits, check_request
from flexp.links.translate import error_frame, read_welcome, to_message
from flexp.links.wire import Head, Kind

Answer = tuple[Head, list[bytes]]
Compute = Callable[[str, Frame], "asyncio.Future[Answer]"]


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
        self._order = Order()
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
                if not self._order.new(frame.head.call):
                    self._held -= frame.head.payload
                    self._memory.release(frame.head.payload)
                    continue
                answer = self._compute(self._client, frame)
                await self._answers.put((answer, frame.head.payload))
                if frame.head.kind == Kind.JOIN:
                    head, _ = await asyncio.shield(answer)
                    if head.kind == Kind.WELCOME:
                        _, self._agreement = read_welcome(head.text, to_message(frame, torch.device("cpu")))
                if frame.head.kind == Kind.LEAVE:
                    break
        except LinkError as error:  # whoever breaks the protocol has what came before answered, and this
            last: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            refusal = error_frame(error)
            last.set_result((refusal.head, encode(refusal)))
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
