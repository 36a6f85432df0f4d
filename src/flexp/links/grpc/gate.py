"""The gate of a server: who may open a stream, and who may keep it."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import grpc

from flexp.errors import ConfigError, LinkError
from flexp.links.frames import VERSION
from flexp.links.grpc.security import CLIENT_KEY, OPERATOR, PROTOCOL_KEY, TOKEN_KEY
from flexp.links.grpc.stream import Stream
from flexp.links.grpc.tokens import Tokens, check_name

CHECK_SECONDS = 1.0
"""How soon a stream ends after its token was revoked, at the latest."""

CLEAR_SECONDS = 5.0
"""What a stream that gives way gets to end."""

STRANGER = "client and token do not go together"


@dataclass
class _Failures:
    count: int = 0
    until: float = 0.0
    last: float = 0.0


class Attempts:
    """Guesses of a token that were wrong: who keeps guessing one waits, twice as long each time.

    It is the token that is locked, for the address that guesses it, and after ten times as many guesses for all
    addresses: other clients behind the same address are not kept out. Nor is one whose token was right there once,
    whatever others try in its name. What is remembered is bounded: what failed longest ago is forgotten.

    Args:
        free: failures before the first wait, of 1 s; each further one doubles it.
        longest: of the waits, in seconds. So long after the last failure all of them are forgotten, too.
        most: of each kind that are remembered.
    """

    def __init__(
        self, free: int = 10, longest: float = 60.0, most: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._free, self._longest, self._most, self._clock = free, longest, most, clock
        self._failures: OrderedDict[tuple[str, str], _Failures] = OrderedDict()
        self._good: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._failures) + len(self._good)

    def wait(self, client: str, address: str) -> float:
        """Seconds until this client may try again from this address; 0: now."""
        if (client, address) in self._good:
            return 0.0
        now = self._clock()
        known = [self._failures[key] for key in self._keys(client, address) if key in self._failures]
        return max(0.0, *(one.until - now for one in known), 0.0)

    def failed(self, client: str, address: str) -> None:
        """It tried, and may not come in."""
        now = self._clock()
        for key, free in self._keys(client, address).items():
            known = self._failures.setdefault(key, _Failures())
            if now - known.last > self._longest:
                known.count = 0
            known.count, known.last = known.count + 1, now
            over = known.count - free
            if over >= 0:
                known.until = now + min(self._longest, 2.0 ** min(over, 60))
            self._failures.move_to_end(key)
        _bound(self._failures, 2 * self._most)

    def succeeded(self, client: str, address: str) -> None:
        """It came in."""
        for key in self._keys(client, address):
            self._failures.pop(key, None)
        self._good[client, address] = None
        self._good.move_to_end((client, address))
        _bound(self._good, self._most)

    def _keys(self, client: str, address: str) -> dict[tuple[str, str], int]:
        return {(client, address): self._free, (client, ""): 10 * self._free}


class Seldom:
    """Says what happens for one reason a few times at once, then every few seconds, and how often it was silent.

    Args:
        burst: lines of one reason before the first pause.
        seconds: of the pauses.
        most: reasons that are remembered.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        burst: int = 10,
        seconds: float = 10.0,
        most: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._burst, self._seconds, self._most, self._clock = say, burst, seconds, most, clock
        self._known: OrderedDict[tuple[str, str], list[float]] = OrderedDict()

    def __call__(self, reason: str, line: str) -> None:
        now = self._clock()
        said = self._known.setdefault((reason, ""), [0.0, now, 0.0])  # lines at once, when the last was, silent since
        self._known.move_to_end((reason, ""))
        _bound(self._known, self._most)
        if now - said[1] >= self._seconds:
            said[0] = max(0.0, said[0] - (now - said[1]) // self._seconds)
        if said[0] >= self._burst:
            said[2] += 1
            return
        more = f" ({said[2]:.0f} more like this since)" if said[2] else ""
        said[0], said[1], said[2] = said[0] + 1, now, 0.0
        self._say(line + more)


class Gate:
    """Lets clients in by name and token, and ends the streams of those that may not stay.

    Args:
        tokens: of the clients; ``None``: they need none.
        allow: the names that may come; ``None``: all (that have a token).
        aside: says why a client is quarantined, if it is.
        say: told who is refused or thrown out.
        bearer: all streams are one party's, which speaks for clients: the name whose token they need.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        allow: Collection[str] | None,
        aside: Callable[[str], str | None],
        say: Callable[[str], None],
        attempts: Attempts | None = None,
        bearer: str | None = None,
    ) -> None:
        self._tokens, self._bearer = tokens, bearer
        self._allow = None if allow is None else frozenset(allow)
        self._aside, self._say, self._seldom = aside, say, Seldom(say)
        self._attempts = attempts or Attempts()
        self.inside: dict[str, Stream] = {}
        self._marks: dict[str, bytes | None] = {}

    async def admit(self, context: Any) -> str:
        """The client's name, if it may come in; else its stream ends here, and this raises."""
        said = dict(context.invocation_metadata() or ())
        version = said.get(PROTOCOL_KEY, "an older one")
        if version != str(VERSION):
            text = f"the server speaks version {VERSION} of the protocol, the client {version}"
            await context.abort(grpc.StatusCode.ABORTED, f"{text}: use the same FlexP on both sides")
        host = host_of(context.peer())
        name = said.get(CLIENT_KEY, b"")
        try:
            client = check_name(_text(name))
        except (ConfigError, UnicodeDecodeError):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the client does not say a name that can be used")
            raise
        known = await self._knows(context, self._bearer or client, host)  # also for names that are not allowed
        allowed = self._allow is None or client in self._allow
        if not (known and allowed):
            why = "its token is not the one on file" if allowed else "its name is not on the list"
            await self._refuse(context, client, host, STRANGER, f"refused, since {why}")
        self._attempts.succeeded(client, host)
        why_aside = self._aside(client)
        if why_aside is not None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, why_aside)
        await self._clear(client)
        if client in self.inside:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"client {client} is connected already")
        return client

    async def admit_operator(self, context: Any) -> None:
        """End a call that has not the operator's token, where there are tokens."""
        host = host_of(context.peer())
        if not await self._knows(context, OPERATOR, host):
            await self._refuse(context, OPERATOR, host, f"this needs the token of {OPERATOR!r}", "asked in vain")
        self._attempts.succeeded(OPERATOR, host)

    async def _knows(self, context: Any, client: str, host: str) -> bool:
        """Whether the call has the client's token, where there are tokens; ends one that comes too soon."""
        wait = self._attempts.wait(client, host)
        if wait > 0:
            text = f"too many attempts to join have failed; try again in {math.ceil(wait)} s"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)
        try:
            token = _text(dict(context.invocation_metadata() or ()).get(TOKEN_KEY, b""))
        except UnicodeDecodeError:
            token = ""
        return self._tokens is None or self._tokens.accept(client, token)

    def enter(self, client: str, stream: Stream) -> None:
        """``client`` has been let in and has a stream."""
        self.inside[client] = stream
        self._marks[client] = None if self._tokens is None else self._tokens.mark(self._bearer or client)

    async def _clear(self, client: str) -> None:
        """A stream that was refused on joining gives way to the client's next one."""
        known = self.inside.get(client)
        if known is None or not known.refused:
            return
        known.end(LinkError(f"client {client} was refused here, and has connected anew"))
        end = asyncio.get_running_loop().time() + CLEAR_SECONDS
        while self.inside.get(client) is known and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.005)  # it has to leave before the next one joins

    def leave(self, client: str) -> None:
        """Its stream has ended."""
        self.inside.pop(client, None)
        self._marks.pop(client, None)

    def quarantine(self, client: str, why: str) -> None:
        """End a client's stream once it has its last answer; on the loop."""
        stream = self.inside.get(client)
        if stream is not None:
            stream.end(LinkError(why), answered=True)

    async def watch(self) -> None:
        """For ever: end the streams of clients whose token has been revoked or replaced, or has expired."""
        while self._tokens is not None:
            await asyncio.sleep(CHECK_SECONDS)
            for client, stream in list(self.inside.items()):
                if self._tokens.mark(self._bearer or client) != self._marks[client]:
                    self._say(f"{client}: thrown out, since its token is not valid any more")
                    stream.end(LinkError(f"client {client}: its token is not valid any more"))

    async def _refuse(self, context: Any, client: str, host: str, text: str, said: str) -> None:
        self._attempts.failed(client, host)
        self._seldom(host, f"{client}: {said} (from {host})")
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8")


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
