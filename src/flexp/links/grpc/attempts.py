"""Joining attempts that failed, by client and by address: who keeps failing waits, twice as long each time."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Failures:
    count: int = 0
    until: float = 0.0
    last: float = 0.0


class Attempts:
    """Counts failures. What it remembers is bounded: the names and addresses that failed longest ago are forgotten.

    A name is locked for strangers only: an address from which its token was right once is not kept out by what others
    try in that name.

    Args:
        free: failures before the first wait, of 1 s; each further one doubles it.
        longest: of the waits, in seconds. So long after the last failure all of them are forgotten, too.
        most: names, and addresses, that are remembered.
    """

    def __init__(
        self, free: int = 10, longest: float = 900.0, most: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._free, self._longest, self._most, self._clock = free, longest, most, clock
        self._failures: OrderedDict[tuple[str, str], _Failures] = OrderedDict()
        self._good: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures) + len(self._good)

    def wait(self, client: str, address: str) -> float:
        """Seconds until this client may try again from this address; 0: now."""
        keys = [("address", address)]
        if (client, address) not in self._good:
            keys.append(("client", client))
        now = self._clock()
        return max(0.0, *(self._failures[key].until - now for key in keys if key in self._failures), 0.0)

    def failed(self, client: str, address: str) -> None:
        """It tried, and may not come in."""
        now = self._clock()
        for key in (("address", address), ("client", client)):
            known = self._failures.setdefault(key, _Failures())
            if now - known.last > self._longest:
                known.count = 0
            known.count, known.last = known.count + 1, now
            over = known.count - self._free
            if over >= 0:
                known.until = now + min(self._longest, 2.0 ** min(over, 60))
            self._failures.move_to_end(key)
        _bound(self._failures, 2 * self._most)

    def succeeded(self, client: str, address: str) -> None:
        """It came in."""
        for key in (("address", address), ("client", client)):
            self._failures.pop(key, None)
        self._good[client, address] = None
        self._good.move_to_end((client, address))
        _bound(self._good, self._most)


def host_of(peer: str) -> str:
    """The address in what gRPC says of a peer (``ipv4:192.0.2.1:4711``, ``ipv6:[::1]:4711``); of IPv6 the network.

    Whoever has one IPv6 address usually has all of its /64.
    """
    text = peer.partition(":")[2].rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return peer.partition(":")[0]  # a local socket, which has no address
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _bound(known: OrderedDict[tuple[str, str], Any], most: int) -> None:
    while len(known) > most:
        known.popitem(last=False)
