"""A bad network between client and server: a TCP proxy that delays, cuts, damages and resets what passes, by a seed."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Coroutine
from typing import Any

KINDS = ("reset", "truncate", "corrupt", "delay", "stall")


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
