"""Attestation: what runs on the server, by evidence that its processor signs, before a client sends anything at all
(but for its TLS certificate, where ``--cert`` is given).

A client looks at the server's certificate, which its authority must have signed, from then on speaks to whoever has
that certificate's key alone, and sends a random number. The evidence that comes back must be genuine, name the
measurement that the client's owner expects, and be bound to the number and to the key: an answer of another time, or of
another machine in between, is none. Only then come name, token and everything else, on that same channel.

Vendors' evidence (SEV-SNP, TDX, Nitro, confidential GPUs) is read by their own libraries, in packages that bring a
:class:`Verifier` under the entry point ``flexp.verifiers``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any, Protocol

import grpc

import flexp
from flexp.errors import LinkError
from flexp.links.grpc.loop import SERVICE

EVIDENCE = "Evidence"
NONCE = 32
"""Bytes of the client's random number."""


class Verifier(Protocol):
    """One way to attest, with both of its sides."""

    def evidence(self, binding: bytes) -> bytes:
        """On the server: what its processor says of itself, with the 32 bytes of ``binding`` signed along.

        Raises:
            ConfigError: this machine cannot attest.
        """
        ...

    def measurement(self, evidence: bytes, binding: bytes) -> str:
        """On the client: what runs there, in hexadecimal.

        Raises:
            LinkError: the evidence is not genuine, or bound to something else.
        """
        ...


class Software:
    """For tests: the hash of FlexP's own source. What signs it is known to all, so it proves nothing to anybody."""

    name = "software"
    key = b"known to all"

    def evidence(self, binding: bytes) -> bytes:
        """See :class:`Verifier`."""
        found, place = hashlib.sha256(), Path(flexp.__file__).parent
        for file in sorted(place.rglob("*.py")):
            found.update(str(file.relative_to(place)).encode() + b"\0" + file.read_bytes())
        return found.digest() + self._signature(found.digest(), binding)

    def measurement(self, evidence: bytes, binding: bytes) -> str:
        """See :class:`Verifier`."""
        if not hmac.compare_digest(evidence[32:], self._signature(evidence[:32], binding)):
            raise LinkError("the evidence is not signed for this connection")
        return evidence[:32].hex()

    def _signature(self, measured: bytes, binding: bytes) -> bytes:
        return hmac.digest(self.key, measured + binding, "sha256")


class Attesting:
    """A server's answers to whoever asks for evidence, before it knows who that is: one at a time.

    Args:
        certificate: of its TLS (DER).

    Raises:
        ConfigError: this machine cannot attest.
    """

    def __init__(self, verifier: Verifier, certificate: bytes) -> None:
        self._verifier, self._certificate, self._turn = verifier, certificate, asyncio.Lock()
        verifier.evidence(bound_to(bytes(NONCE), certificate))

    async def answer(self, nonce: bytes, context: Any) -> bytes:
        """Evidence bound to ``nonce``."""
        if len(nonce) != NONCE:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"expected {NONCE} random bytes")
        async with self._turn:
            return await asyncio.to_thread(self._verifier.evidence, bound_to(nonce, self._certificate))


async def attested(channel: Any, verifier: Verifier, certificate: bytes, expected: str) -> None:
    """Ask for evidence over a channel that none but the key of ``certificate`` can answer, and judge it.

    Raises:
        LinkError: the server gives none, or it names another measurement than the one that is ``expected``.
    """
    nonce = secrets.token_bytes(NONCE)
    try:
        evidence: bytes = await channel.unary_unary(f"/{SERVICE}/{EVIDENCE}")(nonce)
    except grpc.aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.UNIMPLEMENTED:
            raise
        raise LinkError("the server gives no evidence of what runs there (flexp server --verifier); nothing was "
                        "sent") from error  # fmt: skip
    try:
        found = verifier.measurement(evidence, bound_to(nonce, certificate))
    except LinkError as error:
        raise LinkError(f"{error}; nothing was sent") from error
    if found.lower() != expected.lower():
        raise LinkError(
            f"the server runs what is measured as {found}, and {expected} is expected (--measurement); nothing was sent"
        )


def bound_to(nonce: bytes, certificate: bytes) -> bytes:
    """What evidence must be bound to: SHA-256 of the client's number and of the server's certificate (DER), so of the
    key of this connection."""
    return hashlib.sha256(b"flexp" + nonce + certificate).digest()
