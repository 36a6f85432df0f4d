"""Which token each client has: a file of hashes that may change while the server runs.

One line a client: the SHA-256 hash of its token in hexadecimal, a space, its name, and then, each behind a tab, what
else is known: ``issued=``, ``expires=`` and ``revoked=`` with a time in UTC. # begins a comment. Hashes suffice for
tokens that are random and long, which guessing cannot find; they are not for passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock

from flexp.errors import ConfigError, StorageError
from flexp.files import storage_error, write_private

MOST_NAME = 200
_NOBODY = hashlib.sha256(b"").digest()
_TIMES = ("issued", "expires", "revoked")
log = logging.getLogger("flexp.links")


@dataclass(frozen=True)
class Token:
    """What is on file about one client's token; the times are in UTC."""

    client: str
    digest: bytes
    issued: datetime | None = None
    expires: datetime | None = None
    revoked: datetime | None = None

    def valid(self, now: datetime) -> bool:
        """Whether it opens anything."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    @property
    def line(self) -> str:
        """As it stands in the file."""
        times = [f"\t{name}={time_text(value)}" for name in _TIMES if (value := getattr(self, name)) is not None]
        return f"{self.digest.hex()} {self.client}{''.join(times)}"


class Tokens:
    """Says whether a token is a client's. With a file, it looks whether that has changed before it answers."""

    def __init__(self, hashes: dict[str, bytes]) -> None:
        self._known = {name: Token(name, digest) for name, digest in hashes.items()}
        self._path: Path | None = None
        self._seen: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """What is in a file, now and whenever it changes.

        Raises:
            StorageError: it cannot be read.
            ConfigError: a line is none, or a name comes twice.
        """
        tokens = cls({})
        tokens._path, tokens._seen = Path(path), _stamp(path)
        tokens._known = {item.client: item for item in read_tokens(path)}
        return tokens

    def accept(self, client: str, token: str) -> bool:
        """Whether the token is this client's, and valid. Takes as long for a name that is unknown."""
        self.refresh()
        given = hashlib.sha256(token.encode()).digest()
        known = self._known.get(client)
        same = hmac.compare_digest(given, _NOBODY if known is None else known.digest)
        if known is not None and hmac.compare_digest(token.encode(), known.digest.hex().encode()):
            log.warning("%s: the line of %s has a token, expected its SHA-256 hash (flexp token issue writes it)",
                        self._path, client)  # fmt: skip
        return same and known is not None and known.valid(datetime.now(UTC))

    def missing(self, clients: Sequence[str] | None) -> str | None:
        """What to say of those among ``clients`` (``None``: all that may come) that cannot, for they have no valid
        token; ``None``: nothing."""
        self.refresh()
        if clients is None:
            return None if any(map(self.mark, [*self._known])) else f"{self._path} has no valid token: nobody can join"
        names = [name for name in clients if self.mark(name) is None]
        return f"{self._path} has no valid token of {', '.join(names)}, who cannot join" if names else None

    def mark(self, client: str) -> bytes | None:
        """What changes when a client's token is revoked, has expired or was issued anew; ``None``: it has no valid one.

        Whoever came in with one mark may stay as long as it is the same.
        """
        self.refresh()
        known = self._known.get(client)
        return known.digest if known is not None and known.valid(datetime.now(UTC)) else None

    def refresh(self) -> None:
        """Read the file again if it has changed. One that cannot be read leaves everything as it was."""
        if self._path is None:
            return
        seen = _stamp(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._known = {item.client: item for item in read_tokens(self._path)}
        except (StorageError, ConfigError) as error:
            log.warning("the tokens stay as they were: %s", error)


def read_tokens(path: Path) -> list[Token]:
    """The tokens of a file, in order.

    Raises:
        StorageError: it cannot be read.
        ConfigError: a line is none, or a name comes twice.
    """
    return [item for item in _parsed(path, _lines(path)) if item is not None]


def issue(path: Path, client: str, *, days: float | None = None, again: bool = False) -> str:
    """A new token for a client. Only its hash goes into the file, which is made if need be.

    Args:
        days: after which it expires.
        again: replace a token that is valid.

    Raises:
        ConfigError: the name is none, or has a token; or the file holds something else.
        StorageError: the file cannot be read or written.
    """
    if check_name(client) != client.strip():
        raise ConfigError(f"{client!r} has spaces around it; expected a name without")
    if any(part in ("", ".", "..") for part in re.split(r"[/\\]", client)):
        raise ConfigError(f"{client!r} is a path; expected a client's name, which leads nowhere")
    now = datetime.now(UTC)
    try:
        expires = None if days is None else now + timedelta(days=days)
    except OverflowError as error:
        raise ConfigError(f"{days:g} days are too many; leave them out for a token that does not expire") from error
    token = secrets.token_hex(32)
    made = Token(client, hashlib.sha256(token.encode()).digest(), now, expires)
    with _changing(path) as (lines, known):
        place = _place(known, client)
        if place is None:
            lines.append(made.line)
            return token
        earlier = known[place]
        if not again and earlier is not None and earlier.valid(now):
            raise ConfigError(f"{path}: {client} has a valid token already; say --again to replace it")
        lines[place] = made.line
    return token


def revoke(path: Path, client: str) -> None:
    """Mark a client's token as revoked: servers that read the file refuse it from then on, and end its stream.

    Raises:
        ConfigError: the client has no token, or it is revoked already.
        StorageError: the file cannot be read or written.
    """
    with _changing(path) as (lines, known):
        place = _place(known, client)
        earlier = None if place is None else known[place]
        if place is None or earlier is None:
            raise ConfigError(f"{path}: there is no token of {client}; flexp token list shows those that are")
        if earlier.revoked is not None:
            raise ConfigError(f"{path}: the token of {client} was revoked already, at {time_text(earlier.revoked)}")
        lines[place] = replace(earlier, revoked=datetime.now(UTC)).line


def check_token(token: str | None) -> str | None:
    """A token as it is sent, without what a file or a shell leaves around it; ``None``: there is none.

    Raises:
        ConfigError: it is not printable ASCII. What it is stays unsaid.
    """
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ConfigError("the token (FLEXP_TOKEN, --token or token=…) has characters that no token has; expected what "
                          "flexp token issue printed")  # fmt: skip
    return token or None


def check_name(client: str) -> str:
    """A client's name, if it may be one.

    Raises:
        ConfigError: it is empty, long, or not printable.
    """
    if not client or not client.isprintable() or len(client.encode()) > MOST_NAME:
        raise ConfigError(f"{client!r} is no name for a client: expected 1 to {MOST_NAME} bytes of printable text")
    return client


def time_text(time: datetime) -> str:
    """UTC, to the second: ``2026-01-31T12:00:00Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(path: Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise StorageError(
            f"{path}: the tokens cannot be read: there is no such file (flexp token issue makes it)"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: the tokens cannot be read ({error})") from error


def _parsed(path: Path, lines: list[str]) -> list[Token | None]:
    """What each line says; ``None``: nothing, it is empty or a comment."""
    found: list[Token | None] = []
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            found.append(None)
            continue
        start, *details = line.split("\t")
        digest, _, name = start.strip().partition(" ")
        name = name.strip()
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest) or not name or name in names:
            raise ConfigError(
                f"{path}, line {number}: expected a SHA-256 hash in hexadecimal, a space and a client's name, "
                "each name once"
            )
        names.add(name)
        found.append(Token(name, bytes.fromhex(digest), **_times(path, number, details)))
    return found


def _times(path: Path, number: int, details: list[str]) -> dict[str, datetime]:
    times: dict[str, datetime] = {}
    for detail in details:
        key, _, value = detail.strip().partition("=")
        try:
            if key not in _TIMES:
                raise ValueError
            times[key] = datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: {detail.strip()!r} is none of {', '.join(_TIMES)} with a time like "
                "2026-01-31T12:00:00Z"
            ) from error
    return times


def _place(known: list[Token | None], client: str) -> int | None:
    return next((place for place, item in enumerate(known) if item is not None and item.client == client), None)


@contextmanager
def _changing(path: Path) -> Iterator[tuple[list[str], list[Token | None]]]:
    """The lines of a file and what they say; what the block makes of the lines is written, for its owner alone."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            lines = _lines(path) if path.exists() else []
            yield lines, _parsed(path, lines)
            write_private(path, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise storage_error(path, error) from error


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
