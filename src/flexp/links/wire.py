"""The head of a frame as bytes. docs/protocol.md says the same for other languages.

A frame is a *head* (what it is, and every tensor's name, type and shape) followed by the tensors' bytes
(:mod:`flexp.links.frames`). All numbers are little-endian.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from flexp.errors import LinkError, LinkLostError

MAGIC = b"FLXP"
VERSION = 2
CHUNK = 1 << 20
MOST_TEXT = 1 << 16
MOST_FIELDS = 2048
MOST_NAME = 200
MOST_DIMENSIONS = 8
DAMAGED = "a frame was damaged on its way: its checksum differs"


class Kind(IntEnum):
    """What a frame is."""

    JOIN = 1
    WELCOME = 2
    FORWARD = 3
    FORWARD_REPLY = 4
    BACKWARD = 5
    BACKWARD_REPLY = 6
    PULL = 7
    PULL_REPLY = 8
    ABORT = 9
    LEAVE = 10
    DONE = 11
    ERROR = 12
    EXTEND = 13
    EXTEND_REPLY = 14
    END_GENERATION = 15
    READY = 16
    ORDER = 17
    FETCH = 18
    FETCH_REPLY = 19


DTYPES: dict[int, torch.dtype] = {
    1: torch.float32,
    2: torch.bfloat16,
    3: torch.float16,
    4: torch.float64,
    5: torch.int64,
    6: torch.int32,
    7: torch.uint8,
    8: torch.bool,
    9: torch.int8,
    10: torch.float8_e4m3fn,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_PACKED = 0x80  # set in a type's code: entries are 0 or 1 and cross as one byte each

# magic, version, kind, number of fields, call, seconds of computing, bytes of text, CRC-32 of the tensors' bytes
_HEAD = struct.Struct("<4sBBHQdII")
_CHECK = struct.Struct("<I")  # CRC-32 of the head before it
# The numbers of each kind: see translate.py.
_NUMBERS = {
    Kind.FORWARD: struct.Struct("<qBq"),
    Kind.FORWARD_REPLY: struct.Struct("<Bd"),
    Kind.BACKWARD: struct.Struct("<qqqdd"),
    Kind.PULL: struct.Struct("<qqq"),
    Kind.EXTEND: struct.Struct("<qq"),
    Kind.END_GENERATION: struct.Struct("<q"),
    Kind.FETCH: struct.Struct("<qqq"),
    Kind.FETCH_REPLY: struct.Struct("<qq"),
}
_NONE = struct.Struct("<")


@dataclass(frozen=True)
class Field:
    """One tensor of a frame: ``dtype`` is what the receiver makes of it; ``packed`` ones cross as a byte an entry."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    packed: bool = False

    @property
    def size(self) -> int:
        """Its bytes, as they cross."""
        return math.prod(self.shape) * (1 if self.packed else self.dtype.itemsize)


@dataclass(frozen=True)
class Head:
    """All of a frame but its tensors' bytes.

    Attributes:
        call: numbers a client's requests; an answer repeats its request's. 0: about the stream as a whole.
        seconds: that the server computed, in its answers.
        numbers: the message's scalars, in the order that the kind prescribes.
        text: JSON, for joining, orders and errors.
        size: bytes of the head itself.
        check: CRC-32 of the tensors' bytes, one after the other.
    """

    kind: Kind
    call: int
    seconds: float = 0.0
    numbers: tuple[Any, ...] = ()
    text: str = ""
    fields: tuple[Field, ...] = ()
    size: int = 0
    check: int = 0

    @property
    def payload(self) -> int:
        """Bytes of all tensors."""
        return sum(item.size for item in self.fields)


def parse(message: bytes) -> Head:
    """The head at the beginning of a frame's first message. Nothing is allocated but what it says.

    Raises:
        LinkLostError: it was damaged on its way.
        LinkError: it is no head of this version, or is cut short, or goes beyond a limit.
    """
    reader = _Reader(message)
    magic, version, kind, count, call, seconds, text, check = reader.take(_HEAD)
    if magic != MAGIC:
        raise LinkError(f"a frame begins with {magic!r}, expected {MAGIC!r}: the other side speaks another protocol")
    if version != VERSION:
        raise LinkError(f"the frame is of version {version}, expected {VERSION}: use the same FlexP on both sides")
    if kind not in Kind._value2member_map_:
        raise LinkError(f"the frame is of an unknown kind, {kind}")
    if count > MOST_FIELDS or text > MOST_TEXT:
        raise LinkError(
            f"the frame announces {count} fields and {text} bytes of text, "
            f"expected at most {MOST_FIELDS} and {MOST_TEXT}"
        )
    if not math.isfinite(seconds):
        raise LinkError("the frame's seconds are not a finite number")
    numbers = reader.take(_NUMBERS.get(Kind(kind), _NONE))
    words = reader.text(text)
    fields = tuple(reader.field() for _ in range(count))
    end = reader.at
    if reader.take(_CHECK) != (zlib.crc32(message[:end]),):
        raise LinkLostError(DAMAGED)
    return Head(Kind(kind), call, seconds, numbers, words, fields, reader.at, check)


class _Reader:
    """Walks over a message and never beyond its end."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self.at = 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self._raw(layout.size))

    def text(self, size: int) -> str:
        try:
            return self._raw(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise LinkError("a text of the frame is not UTF-8") from error

    def field(self) -> Field:
        size, code, dimensions = self.take(struct.Struct("<BBB"))
        dtype, packed = DTYPES.get(code & ~_PACKED), bool(code & _PACKED)
        if dtype is None:
            raise LinkError(f"a field of the frame has an unknown type, {code}")
        if size > MOST_NAME or dimensions > MOST_DIMENSIONS:
            raise LinkError(
                f"a field has a name of {size} bytes and {dimensions} dimensions, "
                f"expected at most {MOST_NAME} and {MOST_DIMENSIONS}"
            )
        name = self.text(size)
        shape = self.take(struct.Struct(f"<{dimensions}I"))
        if 0 in shape:
            raise LinkError(f"the field {name!r} is empty: its shape is {shape}")
        return Field(name, dtype, shape, packed)

    def _raw(self, size: int) -> bytes:
        if self.at + size > len(self._message):
            raise LinkError(f"the frame's head is cut short after {len(self._message)} bytes")
        self.at += size
        return self._message[self.at - size : self.at]


def head_bytes(head: Head) -> bytes:
    """A frame's head, for :func:`parse`.

    Raises:
        LinkError: a name, a number or a text has no place in it.
    """
    text = head.text.encode()
    if len(head.fields) > MOST_FIELDS or len(text) > MOST_TEXT:
        raise LinkError(
            f"a message of {len(head.fields)} tensors and {len(text)} bytes of text is too large: "
            f"at most {MOST_FIELDS} and {MOST_TEXT} can cross"
        )
    try:
        numbers = _NUMBERS.get(head.kind, _NONE).pack(*head.numbers)
        start = _HEAD.pack(MAGIC, VERSION, head.kind, len(head.fields), head.call, head.seconds, len(text), head.check)
        content = b"".join([start, numbers, text, *map(_field_bytes, head.fields)])
        return content + _CHECK.pack(zlib.crc32(content))
    except struct.error as error:
        raise LinkError(f"a number is too large to cross ({error})") from error


def signed(message: bytes) -> bytes:
    """A frame in one message with its two check sums made right, whatever else it is: for tests and fuzzing."""
    reader = _Reader(message)
    try:
        _, _, kind, count, *_, text, _ = reader.take(_HEAD)
        reader.take(_NUMBERS.get(kind, _NONE))
        reader.text(text)
        for _ in range(count):
            reader.field()
    except LinkError:
        return message
    end, after = reader.at, reader.at + _CHECK.size
    place = _HEAD.size - _CHECK.size
    head = message[:place] + _CHECK.pack(zlib.crc32(message[after:])) + message[_HEAD.size : end]
    return head + _CHECK.pack(zlib.crc32(head)) + message[after:]


def _field_bytes(item: Field) -> bytes:
    name = item.name.encode()
    if len(name) > MOST_NAME or len(item.shape) > MOST_DIMENSIONS or 0 in item.shape:
        raise LinkError(f"the tensor {item.name!r} of shape {item.shape} is empty or too strange to cross")
    code = CODES[item.dtype] | (_PACKED if item.packed else 0)
    return struct.pack(f"<BBB{len(name)}s{len(item.shape)}I", len(name), code, len(item.shape), name, *item.shape)
