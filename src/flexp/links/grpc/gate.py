"""The gate of a server: who may open a stream, and who may keep it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection
from typing import Any

import grpc

from flexp.errors import ConfigError, LinkError
from flexp.links.grpc.attempts import Attempts, host_of
from flexp.links.grpc.security import CLIENT_KEY, TOKEN_KEY
from flexp.links.grpc.stream import Stream
from flexp.links.grpc.tokens import Tokens, check_name

CHECK_SECONDS = 1.0
"""How soon a stream ends after its token was revoked, at the latest."""

STRANGER = "client and token do not go together"


class Gate:
    """Lets clients in by name and token, and ends the streams of those that may not stay.

    Args:
        tokens: of the clients; ``None``: they need none.
        allow: the names that may come; ``None``: all (that have a token).
        aside: says why a client is put aside, if it is.
        say: told who is refused or thrown out.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        allow: Collection[str] | None,
        aside: Callable[[str], str | None],
        say: Callable[[str], None],
        attempts: Attempts | None = None,
    ) -> None:
        self._tokens = tokens
        self._allow = None if allow is None else frozenset(allow)
        self._aside, self._say = aside, say
        self._attempts = attempts or Attempts()
        self.inside: dict[str, Stream] = {}
        self._marks: dict[str, bytes | None] = {}

    async def admit(self, context: Any) -> str:
        """The client's name, if it may come in; else its stream ends here, and this raises."""
        said = dict(context.invocation_metadata() or ())
        host = host_of(context.peer())
        name = said.get(CLIENT_KEY, b"")
        try:
            client = check_name(_text(name))
        except (ConfigError, UnicodeDecodeError):
            await self._refuse(context, None, host, "the client does not say a name that can be used")
            raise
        wait = self._attempts.wait(client, host)
        if wait > 0:
            text = f"too many attempts to join have failed; try again in {math.ceil(wait)} s"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)
        try:
            token = _text(said.get(TOKEN_KEY, b""))
        except UnicodeDecodeError:
            token = ""
        known = self._tokens is None or self._tokens.accept(client, token)  # also for names that are not allowed
        allowed = self._allow is None or client in self._allow
        if not (known and allowed):
            why = "its token is not the one on file" if allowed else "its name is not on the list"
            await self._refuse(context, client, host, STRANGER, f"{client}: refused, since {why}")
        self._attempts.succeeded(client, host)
        why_aside = self._aside(client)
        if why_aside is not None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, why_aside)
        if client in self.inside:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"client {client} is connected already")
        return client

    def enter(self, client: str, stream: Stream) -> None:
        """``client`` has been let in and has a stream."""
        self.inside[client] = stream
        self._marks[client] = None if self._tokens is None else self._tokens.mark(client)

    def leave(self, client: str) -> None:
        """Its stream has ended."""
        self.inside.pop(client, None)
        self._marks.pop(client, None)

    def put_aside(self, client: str, why: str) -> None:
        """End a client's stream once it has its last answer; on the loop."""
        stream = self.inside.get(client)
        if stream is not None:
            stream.end(LinkError(why), answered=True)

    async def watch(self) -> None:
        """For ever: end the streams of clients whose token has been revoked or replaced, or has expired."""
        while self._tokens is not None:
            await asyncio.sleep(CHECK_SECONDS)
            for client, stream in list(self.inside.items()):
                if self._tokens.mark(client) != self._marks[client]:
                    self._say(f"{client}: thrown out, since its token is not valid any more")
                    stream.end(LinkError(f"client {client}: its token is not valid any more"))

    async def _refuse(self, context: Any, client: str | None, host: str, text: str, said: str = "") -> None:
        self._attempts.failed(client or "", host)
        if said:
            self._say(said)
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8")
