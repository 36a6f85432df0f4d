"""What only the operator may ask of a server: how it is, and to let a client in again that was put aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from flexp.errors import LinkError
from flexp.links.grpc.status import STATUS, ask, check_operator, status_handler
from flexp.links.grpc.tokens import Tokens, check_name

READMIT = "Readmit"


def operator_handlers(
    facts: Callable[[], dict[str, Any]] | None, readmit: Callable[[str], bool], tokens: Tokens | None
) -> dict[str, grpc.RpcMethodHandler]:
    """The server's side, by the names of the methods. Without tokens, anybody who reaches the server may ask."""

    async def let_in(client: bytes, context: Any) -> bytes:
        await check_operator(context, tokens)
        return b"yes" if readmit(client.decode("utf-8", "replace")) else b"no"

    handlers = {READMIT: grpc.unary_unary_rpc_method_handler(let_in)}
    if facts is not None:
        handlers[STATUS] = status_handler(facts, tokens)
    return handlers


def ask_readmit(url: str, client: str, *, token: str | None = None, ca: Path | None = None, insecure: bool) -> None:
    """Let a client in again.

    Raises:
        ConfigError: the address or the name is none, or plaintext would leave this machine.
        LinkError: no server answers, or not to this token; or the client is not put aside.
    """
    answer = ask(url, READMIT, check_name(client).encode(), token=token, ca=ca, insecure=insecure)
    if answer != b"yes":
        raise LinkError(f"the server has not put {client} aside; flexp status shows whom it has")
