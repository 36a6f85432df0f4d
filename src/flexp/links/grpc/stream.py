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
from flexp.links.rules import Agreement, Limits, check_request
from flexp.links.translate import error_frame, read_welcome, to_message
from flexp.links.wire import Head, Kind

Answer = tuple[Head, list[bytes]]
Compute = Callable[[str, Frame], "asyncio.Future[Answer]"]


class Stream:
    """Reads requests while earlier ones are computed, up to ``limits.unanswered`` of them.

    Args:
        compute: puts a request in the queue of the thread that computes; gives its answer, encoded.
    """

    def __init__(self, client: str, context: Any, limits: Limits, memory: Memory, compute: Compute) -> None:
        self._client, self._context, self._limits = client, context, limits
        self._memory, self._compute = memory, compute
        self._agreement: Agreement | None = None
        self._held = 0  # bytes of memory
        self._answers: asyncio.Queue[tuple[asyncio.Future[Answer], int] | None] = asyncio.Queue(limits.unanswered)

    async def run(self) -> None:
        """Serve until the client leaves or vanishes, or breaks the protocol, which ends its stream."""
        tasks = {asyncio.ensure_future(self._read_all()), asyncio.ensure_future(self._write_all())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = next((task.exception() for task in done if task.exception()), None)
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

    async def _read_all(self) -> None:
        try:
            while True:
                frame = await read_frame(
                    self._read, grpc.aio.EOF, self._check, self._reserve, self._limits.frame_seconds
                )
                if frame is None:
                    break
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

    async def _read(self) -> Any:
        if self._agreement is not None:
            return await self._context.read()
        async with within(self._limits.join_seconds, f"client {self._client} connected, but did not join"):
            return await self._context.read()

    def _check(self, head: Head) -> None:
        check_request(head, self._agreement, self._client)

    async def _reserve(self, size: int) -> None:
        await self._memory.reserve(size)
        self._held += size
