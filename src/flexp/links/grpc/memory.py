"""Room for tensors that are on their way: what does not fit waits outside."""

from __future__ import annotations

import asyncio

from flexp.errors import LinkError


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
