"""When a device that comes and goes is there."""

from __future__ import annotations

from flexp.cost.classes import DeviceProfile
from flexp.data.seeding import generator


class Presence:
    """When a device is there: alternating exponential periods, from a generator of the client's own."""

    def __init__(self, device: DeviceProfile, seed: int, client: str) -> None:
        self.on, self.off = device.mean_on_s or 0.0, device.mean_off_s or 0.0
        if self.off:
            self._random = generator(seed, "availability", client)
            self.there = bool(self._random.random() < self.on / (self.on + self.off))
            self.until = self._period()

    def away(self, now: float, seconds: float) -> float:
        """How long the device is away while ``seconds`` of work are done from ``now`` on, which never goes back."""
        if not self.off:
            return 0.0
        away, time, left = 0.0, now, seconds
        while True:
            while self.until <= time:
                self.there = not self.there
                self.until += self._period()
            if self.there and time + left <= self.until:
                return away
            if self.there:
                left -= self.until - time
            else:
                away += self.until - time
            time = self.until

    def _period(self) -> float:
        return float(self._random.exponential(self.on if self.there else self.off))
