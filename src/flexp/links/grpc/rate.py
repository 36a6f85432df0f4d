"""How fast a client may send: who is faster is read more slowly, and the network holds it back."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from flexp.links.rules import Limits


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
