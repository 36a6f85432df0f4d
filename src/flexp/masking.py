"""Sums over clients that the server adds and cannot read.

Every client hides its numbers under a mask that is drawn from a key of the *group*, which the clients have and the
server has not; the server adds what it is given, and each client takes the masks of those who are in the sum off
again. In the words of secure aggregation (Bonawitz et al., 2017, CCS) it is the server, too, from whom the total is
kept: class sums of features that the server computed itself would give it every label, added up over clients as well.

The numbers are integers modulo 2⁶⁴ (fixed point), so that a total does not depend on order, and masked and plain sums
are equal bit for bit. Who is lost before sending is just not in the sum: nobody's mask has to cancel against
another's, so no seeds need to be shared in advance.

The group's key comes from a secret that the clients' owners shared among themselves (:meth:`Group.from_secret`), or
one client draws it and seals it for each other by X25519 through the server (:class:`Identity`). The server could put
keys of its own in the place of clients' there: :func:`fingerprint` is what owners compare, or pin.

What remains: a server and one client of the group together read each client's sums.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexp.errors import ConfigError, LinkError, TrainingError

MOST_CLIENTS = 2**12
"""Whose numbers can be added without running over."""


@dataclass(frozen=True)
class Scale:
    """Where the fixed point of a sum lies: ``bits`` are behind it, and each number is below ``largest``."""

    bits: int
    largest: float


SUMS = Scale(24, 2.0 ** (63 - 24) / MOST_CLIENTS)
"""Steps of 6e-8."""
SHARES = Scale(52, 2.0**10)
"""Of numbers times the shares of those who give them, whose sum is hardly larger than the largest: steps of 2e-16."""
NONCE_BYTES = 16
KEY_BYTES = 32
SECRET_BYTES = 16
"""Of a shared secret, at the least."""
_AEAD_NONCE = 12

Numbers = NDArray[np.float64]
Ring = NDArray[np.uint64]


def to_ring(values: Numbers, scale: Scale = SUMS) -> Ring:
    """Real numbers as integers modulo 2⁶⁴, rounded.

    Raises:
        TrainingError: a number is not finite, or too large.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.abs(values).max(initial=0.0) < scale.largest:  # nor is NaN
        raise TrainingError(
            f"a sum over clients takes finite numbers below {scale.largest:.0e}, and has others; lower the learning "
            "rates (or scale the numbers that are learned); in a meeting, set method.meet.gram = false"
        )
    return np.rint(values * 2.0**scale.bits).astype(np.int64).view(np.uint64)


def from_ring(values: Ring, scale: Scale = SUMS) -> Numbers:
    """The other way."""
    return values.view(np.int64).astype(np.float64) / 2.0**scale.bits


class Group:
    """A key that the clients of a run have, and the server has not.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def mark(self) -> str:
        """Sixteen letters that tell one key from another, and nothing of it."""
        return _derived(self._key, "mark").hex()[:16]

    def digest(self, text: str) -> str:
        """Letters that tell one text from another to the clients, and nothing of it to the server."""
        return _derived(self._key, "digest", text).hex()

    @classmethod
    def from_secret(cls, secret: bytes, run: str) -> Group:
        """The key of one run, from what the owners share over all of them.

        Raises:
            ConfigError: the secret is shorter than :data:`SECRET_BYTES`.
        """
        if len(secret) < SECRET_BYTES:
            raise ConfigError(
                f"the group's secret has {len(secret)} bytes, expected at least {SECRET_BYTES}: "
                "make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
            )
        return cls(_derived(secret, "group", run))

    def hide(self, values: Numbers, client: str, purpose: str, nonce: bytes, scale: Scale = SUMS) -> Ring:
        """A client's numbers under its mask. A nonce is for one set of numbers: of two under one mask
        the server would learn the difference.

        Args:
            purpose: what is added up (a run's name and the number of the meeting).
            nonce: :data:`NONCE_BYTES` random bytes, sent along.
        """
        hidden: Ring = to_ring(values, scale) + self._mask(len(values), client, purpose, nonce)
        return hidden

    def reveal(self, total: Ring, nonces: Mapping[str, bytes], purpose: str, scale: Scale = SUMS) -> Numbers:
        """The sum of the numbers of those clients whose nonces these are.

        Raises:
            LinkError: the total is not of these clients.
        """
        for client, nonce in nonces.items():
            total = total - self._mask(len(total), client, purpose, nonce)
        return from_ring(total, scale)

    def _mask(self, length: int, client: str, purpose: str, nonce: bytes) -> Ring:
        ciphers = cryptography("ciphers")
        key = _derived(self._key, "mask", purpose, client, nonce.hex())
        # A key is for one stream, so the stream may begin at zero.
        stream = ciphers.Cipher(ciphers.algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        return np.frombuffer(stream.update(bytes(8 * length)), dtype="<u8").astype(np.uint64)


def add(parts: Sequence[Ring]) -> Ring:
    """What the server does: adds integers modulo 2⁶⁴, all of one length (it knows no more of them)."""
    total: Ring = np.sum(np.stack(parts), axis=0, dtype=np.uint64)
    return total


class Identity:
    """A client's own pair of keys (X25519), kept with its state.

    Args:
        private: the 32 bytes of one that was kept; ``None``: a new one.
    """

    def __init__(self, private: bytes | None = None) -> None:
        x25519 = cryptography("x25519")
        self._key = (
            x25519.X25519PrivateKey.generate()
            if private is None
            else x25519.X25519PrivateKey.from_private_bytes(private)
        )
        self.public: bytes = self._key.public_key().public_bytes_raw()

    @property
    def private(self) -> bytes:
        """To be kept, readable by the owner alone."""
        return bytes(self._key.private_bytes_raw())

    def deal(self, publics: Mapping[str, bytes]) -> dict[str, bytes]:
        """A new key for the group, sealed for each of its clients.

        Raises:
            LinkError: what a client gave, or the server gives for it, is no key.
        """
        key = secrets.token_bytes(KEY_BYTES)
        return {client: self._seal(key, client, publics) for client in publics}

    def open(self, sealed: bytes, client: str, dealer: bytes, publics: Mapping[str, bytes]) -> Group:
        """The group of a key that another client sealed for this one.

        Raises:
            LinkError: it was sealed for another client or another list of clients, or on its way changed.
        """
        from cryptography.exceptions import InvalidTag

        try:
            nonce, rest = sealed[:_AEAD_NONCE], sealed[_AEAD_NONCE:]
            return Group(self._shared(dealer, publics).decrypt(nonce, rest, client.encode()))
        except (InvalidTag, ValueError):  # too short for a nonce, or a key that is none
            raise LinkError(
                f"client {client!r}: the group's key was not sealed for it and these {len(publics)} clients; "
                "start the run anew, and compare the group's fingerprints"
            ) from None

    def _seal(self, key: bytes, client: str, publics: Mapping[str, bytes]) -> bytes:
        nonce = secrets.token_bytes(_AEAD_NONCE)
        try:
            shared = self._shared(publics[client], publics)
        except ValueError as error:  # of another length, or a point that all keys agree on
            raise LinkError(f"the public key that the server names for client {client!r} is none ({error})") from None
        return nonce + bytes(shared.encrypt(nonce, key, client.encode()))

    def _shared(self, public: bytes, publics: Mapping[str, bytes]) -> Any:
        """What seals between two clients of this group."""
        other = cryptography("x25519").X25519PublicKey.from_public_bytes(public)
        aead = cryptography("aead")
        return aead.ChaCha20Poly1305(_derived(self._key.exchange(other), "seal", fingerprint(publics)))


def fingerprint(publics: Mapping[str, bytes]) -> str:
    """Eight groups of five digits that stand for these clients with these keys, for people to compare."""
    said = hashlib.sha256(b"".join(_framed(c.encode()) + _framed(k) for c, k in sorted(publics.items())))
    number = int.from_bytes(said.digest(), "big")
    return " ".join(f"{number // 10 ** (5 * place) % 10**5:05d}" for place in range(8))


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


def _derived(key: bytes, *what: str) -> bytes:
    """HKDF (RFC 5869) with SHA-256: 32 bytes for this use of a key alone."""
    hkdf, hashes = cryptography("kdf.hkdf"), cryptography("hashes")
    info = b"flexp sums" + b"".join(_framed(each.encode()) for each in what)
    return bytes(hkdf.HKDF(hashes.SHA256(), KEY_BYTES, None, info).derive(key))


def cryptography(part: str, what: str = "masked sums need") -> Any:
    """A part of that library. Raises ConfigError: it is not installed; ``what`` needs it."""
    from importlib import import_module

    names = {"x25519": "asymmetric.x25519", "aead": "ciphers.aead"}
    try:
        return import_module(f"cryptography.hazmat.primitives.{names.get(part, part)}")
    except ImportError:
        raise ConfigError(
            f"{what} the library cryptography: pip install 'flexp[encryption]' (or pip install cryptography)"
        ) from None
