"""Bytes in a file that only a passphrase opens: a key by scrypt, the content by AES-256-GCM in chunks.

Both are the ``cryptography`` library's (the extra ``flexp[encryption]``). A file is a head of 35 bytes (magic, version,
scrypt's costs, salt, a nonce's beginning) and frames. A frame's nonce ends in its number and in a mark on the last one,
so that frames can neither be exchanged nor left out. Frame 0 is empty: if it does not open, neither will any other, and
the passphrase is the likely reason.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from flexp.errors import ConfigError, StorageError
from flexp.files import replacing

MAGIC = b"FLEXPSEA"
VERSION = 1
CHUNK = 1 << 24  # bytes of content in a frame
TAG = 16  # bytes that GCM adds to each
LOG_N, R, P = 15, 8, 3  # scrypt: 32 MiB, and about as long as the usual N = 2^17 with p = 1
MOST_MEMORY = 1 << 28  # what a head may ask of scrypt
MOST_P = 16
_HEAD = struct.Struct(">8sBBBB16s7s")


def is_sealed(path: Path) -> bool:
    """Whether ``path`` is such a file.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error


def seal(path: Path, content: bytes, passphrase: str) -> None:
    """Write ``content`` to ``path``, encrypted. Nothing of it reaches the disk in the clear.

    Raises:
        ConfigError: the passphrase is empty, or the library is missing.
        StorageError: the disk is full or cannot be written; what stood at ``path`` is untouched.
    """
    if not passphrase:
        raise ConfigError("the passphrase is empty; choose one, or leave encryption out")
    head = _HEAD.pack(MAGIC, VERSION, LOG_N, R, P, os.urandom(16), os.urandom(7))
    cipher = _cipher(head, passphrase)
    chunks = [b"", *(content[start : start + CHUNK] for start in range(0, len(content), CHUNK))]
    with replacing(path) as part, part.open("wb") as file:
        file.write(head)
        for number, chunk in enumerate(chunks):
            file.write(cipher.encrypt(_nonce(head, number, number == len(chunks) - 1), chunk, head))


def unseal(path: Path, passphrase: str) -> bytes:
    """The content of a file that :func:`seal` wrote.

    Raises:
        ConfigError: the library is missing.
        StorageError: the passphrase is another one, or the file is damaged.
    """
    from_disk = _read(path)
    head, frames = from_disk[: _HEAD.size], memoryview(from_disk)[_HEAD.size :]
    cipher = _cipher(head, passphrase, path)
    content = bytearray()
    starts = [0, *range(TAG, len(frames), CHUNK + TAG)]
    for number, start in enumerate(starts):
        stop = TAG if number == 0 else start + CHUNK + TAG
        last = number == len(starts) - 1
        opened = _open(cipher, _nonce(head, number, last), frames[start:stop], head)
        if opened is None and number == 0 and _open(cipher, _nonce(head, 0, not last), frames[:TAG], head) is None:
            raise StorageError(f"{path}: the passphrase does not open it; check it (or the file's first bytes changed)")
        if opened is None:
            raise StorageError(f"{path} is damaged or not whole (part {number} of it does not open); use another copy")
        content += opened
    return bytes(content)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(content) < _HEAD.size + TAG:
        raise StorageError(f"{path} is not whole: it ends before its content begins; use another copy")
    return content


def _open(cipher: Any, nonce: bytes, frame: memoryview, head: bytes) -> bytes | None:
    from cryptography.exceptions import InvalidTag

    try:
        opened: bytes = cipher.decrypt(nonce, frame, head)
    except (InvalidTag, ValueError):  # a frame shorter than its tag
        return None
    return opened


def _nonce(head: bytes, number: int, last: bool) -> bytes:
    """12 bytes: the head's 7, the frame's number, and whether it is the last."""
    return head[-7:] + number.to_bytes(4, "big") + bytes([last])


def _cipher(head: bytes, passphrase: str, path: Path | None = None) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
    except ImportError as error:
        raise ConfigError(
            "encryption needs the library cryptography: pip install 'flexp[encryption]' (or pip install cryptography)"
        ) from error
    magic, version, log_n, r, p, salt, _ = _HEAD.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise StorageError(f"{path}: is of another version of FlexP, or its first bytes changed")
    if not (1 <= log_n <= 24 and r and 1 <= p <= MOST_P and 128 * r << log_n <= MOST_MEMORY):
        raise StorageError(f"{path}: its first bytes are not what was written (scrypt's costs); use another copy")
    key = Scrypt(salt=salt, length=32, n=1 << log_n, r=r, p=p).derive(passphrase.encode("utf-8", "surrogateescape"))
    return AESGCM(key)
