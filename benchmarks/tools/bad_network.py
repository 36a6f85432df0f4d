"""A bad network between client and server, whose faults follow from a seed.

:class:`BadNetwork` is a TCP proxy that delays, cuts, damages and resets what passes; :class:`Relay` speaks gRPC and
passes frames on, now and then one twice, late or after the next.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc

from flexp.links.grpc.loop import METHOD, OPTIONS, SERVICE, wait_for

KINDS = ("reset", "truncate", "corrupt", "delay", "stall")
HELD_SECONDS = 0.05
"""So long a frame is held back for the next one; if none comes it goes on by itself, late."""


class BadNetwork:
    """Listens on a port of its own and passes bytes on to ``target``; a fault now and then.

    - ``reset``: both ways are cut at once. ``truncate``: half of a piece is passed on, then both are cut: mostly in the
      middle of a frame. ``corrupt``: one bit of a piece is turned. ``delay``: a piece waits 20–100 ms. ``stall``:
      nothing passes for 300 ms.

    Args:
        rate: the chance of a fault for each piece of up to 16 KiB that passes.
        most: faults in all; then it is a good network.

    Attributes:
        faults: how many of each kind there were.
    """

    def __init__(self, target: str, *, rate: float, most: int, seed: int = 0) -> None:
        self.faults: Counter[str] = Counter()
        self.target = target
        self._rate, self._most, self._random = rate, most, random.Random(seed)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="flexp-bad-network", daemon=True).start()
        self._server = self._wait(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.address = "127.0.0.1:" + str(self._server.sockets[0].getsockname()[1])

    @property
    def over(self) -> bool:
        """Whether all faults have happened."""
        return self.faults.total() >= self._most

    def close(self) -> None:
        """Stop passing anything on."""
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        ways = [
            asyncio.ensure_future(self._pass(reader, far_writer)),
            asyncio.ensure_future(self._pass(far_reader, writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, far_writer):
            end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1 << 14):
                fault = self._fault(len(piece))
                if fault == "reset":
                    return
                if fault == "truncate":
                    writer.write(piece[: len(piece) // 2])
                    await writer.drain()
                    return
                if fault == "corrupt":
                    broken = bytearray(piece)
                    broken[self._random.randrange(len(broken))] ^= 1 << self._random.randrange(8)
                    piece = bytes(broken)
                elif fault == "delay":
                    await asyncio.sleep(self._random.uniform(0.02, 0.1))
                elif fault == "stall":
                    await asyncio.sleep(0.3)
                writer.write(piece)
                await writer.drain()
        except OSError:
            return

    def _fault(self, size: int) -> str | None:
        # Pieces of a few bytes are HTTP/2's own: acknowledgements and pings, whose loss shows nothing.
        if self.over or size < 64 or self._random.random() >= self._rate:
            return None
        kind = self._random.choice(KINDS)
        self.faults[kind] += 1
        return kind


class Relay:
    """Listens on a port of its own for clients of ``target``. Frames of up to a message (1 MiB) are one message each.

    Args:
        rate: the chance of a fault for each frame, either way.
        most: faults in all.

    Attributes:
        faults: how many frames were ``duplicated``, ``reordered``, or only ``late``, as no other came.
    """

    def __init__(self, target: str, *, rate: float, most: int, seed: int = 0) -> None:
        self.faults: Counter[str] = Counter()
        self._target, self._rate, self._most = target, rate, most
        self._random = random.Random(seed)
        self.address = wait_for(self._start())

    def close(self) -> None:
        """Stop passing anything on."""
        wait_for(self._server.stop(0.1))

    async def _start(self) -> str:
        self._server = grpc.aio.server(options=OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._stream)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _stream(self, _: Any, context: Any) -> None:
        said = [(key, value) for key, value in context.invocation_metadata() if key.startswith("flexp-")]
        async with grpc.aio.insecure_channel(self._target, OPTIONS) as channel:
            far = channel.stream_stream(f"/{SERVICE}/{METHOD}")(metadata=said)
            ways: list[asyncio.Future[None]] = []
            try:
                first = [(key, value) for key, value in await far.initial_metadata() if key.startswith("flexp-")]
                await context.send_initial_metadata(first)
                ways += [
                    asyncio.ensure_future(self._pass(context.read, far.write)),
                    asyncio.ensure_future(self._pass(far.read, context.write)),
                ]
                done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in done:
                    way.result()
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "")
            except (asyncio.InvalidStateError, grpc.aio.BaseError):
                pass  # one side has gone
            finally:
                for way in ways:
                    way.cancel()
                far.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]]) -> None:
        waiting: asyncio.Future[Any] | None = None
        while True:
            message = await (waiting or asyncio.ensure_future(read()))
            waiting = None
            if message is grpc.aio.EOF:
                return
            fault = self._fault()
            if fault == "duplicated":
                await write(message)
            elif fault == "reordered":
                waiting = asyncio.ensure_future(read())
                await asyncio.wait([waiting], timeout=HELD_SECONDS)
                if waiting.done() and waiting.exception() is None and waiting.result() is not grpc.aio.EOF:
                    await write(waiting.result())
                    waiting = None
                    self.faults["reordered"] += 1
                else:
                    self.faults["late"] += 1
            await write(message)

    def _fault(self) -> str | None:
        if self.faults.total() >= self._most or self._random.random() >= self._rate:
            return None
        kind = self._random.choice(("duplicated", "reordered"))
        if kind == "duplicated":
            self.faults[kind] += 1
        return kind
