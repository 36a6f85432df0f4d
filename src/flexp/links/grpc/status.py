"""What only the operator may ask of a server: how it is, and to let a client in again; calls beside the streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from pydantic_core import from_json, to_json

from flexp.errors import LinkError, plain
from flexp.links.grpc.diagnosis import NO_TOKEN, Way
from flexp.links.grpc.link import last_part
from flexp.links.grpc.loop import SERVICE, wait_for, within
from flexp.links.grpc.security import (
    TOKEN_KEY,
    Address,
    channel_credentials,
    check_connecting,
    check_name,
    check_token,
)

STATUS, READMIT = "Status", "Readmit"
NOBODY_KNOWN = (
    "this server has no tokens, so it cannot tell its operator from the client that it has quarantined: wait until "
    "that may come again (server.guard.aside_seconds), or start the server with --tokens"
)


def operator_handlers(
    facts: Callable[[], dict[str, Any]] | None,
    readmit: Callable[[str], bool] | None,
    admit: Callable[[Any], Awaitable[None]],
) -> dict[str, grpc.RpcMethodHandler]:
    """The server's side, by the names of the methods.

    Args:
        readmit: ``None``: there are no tokens, and a client would readmit itself.
        admit: ends a call that is not the operator's.
    """

    async def let_in(client: bytes, context: Any) -> bytes:
        await admit(context)
        if readmit is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NOBODY_KNOWN)
            return b"no"
        return b"yes" if readmit(client.decode("utf-8", "replace")) else b"no"

    async def status(_: Any, context: Any) -> bytes:
        await admit(context)
        assert facts is not None
        found = await asyncio.to_thread(facts)  # it waits for what is computed, which no stream need do
        return to_json(found, inf_nan_mode="null")

    methods = {READMIT: let_in} if facts is None else {READMIT: let_in, STATUS: status}
    return {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}


def ask_status(url: str, **known: Any) -> dict[str, Any]:
    """What a server says of itself; ``known``: as in :func:`ask`.

    Raises:
        ConfigError, LinkError: as :func:`ask`.
    """
    said = ask(url, STATUS, b"", **known)
    try:
        facts: dict[str, Any] = from_json(said)
    except ValueError as error:
        raise LinkError(f"{url}: what answers there says nothing of itself that can be read") from error
    return facts


def ask_readmit(url: str, client: str, **known: Any) -> None:
    """Let a client in again; ``known``: as in :func:`ask`.

    Raises:
        ConfigError: the address or the name is none, or plaintext would leave this machine.
        LinkError: no server answers, or not to this token; or the client is not quarantined.
    """
    answer = ask(url, READMIT, check_name(client).encode(), **known)
    if answer != b"yes":
        raise LinkError(f"the server has not quarantined {client}; flexp status shows whom it has")


def ask(
    url: str,
    method: str,
    request: bytes,
    *,
    token: str | None = None,
    ca: Path | None = None,
    cert: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
    timeout: float = 10.0,
) -> bytes:
    """Call a method of a server, with the operator's token if it has any, and with a certificate if it wants one.

    Raises:
        ConfigError: the address or the token is none, or plaintext would leave this machine.
        LinkError: no server answers, or it does not answer to this token.
    """
    address, token = Address.of_url(url), check_token(token)
    secure = address.secure or ca is not None
    check_connecting(address, secure, insecure=insecure)
    credentials = channel_credentials(ca, cert, key) if secure else None
    way = Way(address, secure, ca, cert, key)

    async def call() -> bytes:
        target = str(address)
        options = way.options([])
        made = (
            grpc.aio.insecure_channel(target, options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options)
        )
        async with made as channel, within(timeout, f"no server answered at {target}"):
            metadata = [(TOKEN_KEY, token.encode())] if token else []
            try:
                answer: bytes = await channel.unary_unary(f"/{SERVICE}/{method}")(request, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    for_good = await asyncio.to_thread(way.will_not_pass, error.details() or "")
                    why = for_good or f"{last_part(error.details())}{way.by_proxy()}"
                    raise LinkError(f"no flexp server can be reached at {target} ({why})") from error
                more = f"; {NO_TOKEN}" if error.code() == grpc.StatusCode.UNAUTHENTICATED and not token else ""
                raise LinkError(f"{target}: {plain(error.details() or error.code().name)}{more}") from error
            return answer

    return wait_for(call())
