"""Frames: messages as bytes. docs/protocol.md says the same for other languages.

A frame is a start with two check sums, and behind it a file in the safetensors format: the size of a JSON text, that
text (every tensor's type, shape and place; the message's scalars as metadata) and the tensors' bytes. Start and text
are the *head*. A frame travels as messages of a stream of exactly :data:`CHUNK` bytes, the last one shorter; the head
is always within the first. So a receiver knows all sizes, and can refuse, before it allocates anything; then bytes go
straight into the tensors that will be used. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from pydantic_core import from_json, to_json
from torch import Tensor

from flexp.errors import LinkError, LinkLostError

MAGIC = b"FLXP"
VERSION = 9
CHUNK = 1 << 20
MOST_TEXT = 768 << 10
MOST_FIELDS = 2048
MOST_NAME = 220
MOST_DIMENSIONS = 8
DAMAGED = "a frame was damaged on its way: its checksum differs"
TYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""By their names in safetensors."""
NAMES = {dtype: name for name, dtype in TYPES.items()}

_START = struct.Struct("<4sBI")  # magic, version, CRC-32 of the rest of the head
_SIZES = struct.Struct("<IQ")  # CRC-32 of the tensors' bytes; here safetensors begins, with the bytes of the text


@dataclass(frozen=True)
class Field:
    """One tensor of a frame."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Head:
    """All of a frame but its tensors' bytes.

    Attributes:
        message: what type of message it is.
        call: numbers a client's requests; an answer repeats its request's. 0: about the stream as a whole.
        seconds: that the server computed, in its answers.
        scalars: of the message, JSON texts by their names.
        fields: in the order in which the tensors' bytes come.
        size: bytes of the head itself.
        check: CRC-32 of the tensors' bytes, one after the other.
    """

    message: str
    call: int
    seconds: float = 0.0
    scalars: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[Field, ...] = ()
    size: int = 0
    check: int = 0

    @property
    def payload(self) -> int:
        """Bytes of all tensors."""
        return sum(item.size for item in self.fields)


@dataclass(frozen=True)
class Frame:
    """A head with its tensors, one for each of its fields."""

    head: Head
    tensors: tuple[Tensor, ...] = ()

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names."""
        return {item.name: value for item, value in zip(self.head.fields, self.tensors, strict=True)}


def describe(name: str, value: Tensor) -> Field:
    """The field that carries ``value``.

    Raises:
        LinkError: tensors of this type or shape cannot cross.
    """
    if value.dtype not in NAMES:
        raise LinkError(f"{name} is {value.dtype}, which cannot cross; use {', '.join(map(str, NAMES))}")
    if len(name.encode()) > MOST_NAME or value.dim() > MOST_DIMENSIONS or not value.numel():
        raise LinkError(f"the tensor {name!r} of shape {tuple(value.shape)} is empty or too strange to cross")
    return Field(name, value.dtype, tuple(value.shape))


def head_bytes(head: Head, check: int = 0) -> bytes:
    """A frame's head, for :func:`parse`; ``check``: CRC-32 of the tensors' bytes.

    Raises:
        LinkError: it is too large.
    """
    table: dict[str, Any] = {
        "__metadata__": {"message": head.message, "call": str(head.call), "seconds": str(head.seconds), **head.scalars}
    }
    place = 0
    for item in head.fields:
        places = [place, place := place + item.size]
        table[item.name] = {"dtype": NAMES[item.dtype], "shape": item.shape, "data_offsets": places}
    text = to_json(table)
    if len(head.fields) > MOST_FIELDS or len(text) > MOST_TEXT:
        raise LinkError(
            f"a message of {len(head.fields)} tensors and {len(text)} bytes of text is too large: "
            f"at most {MOST_FIELDS} and {MOST_TEXT} can cross"
        )
    rest = _SIZES.pack(check, len(text)) + text
    return _START.pack(MAGIC, VERSION, zlib.crc32(rest)) + rest


def parse(message: bytes) -> Head:
    """The head at the beginning of a frame's first message. Nothing is allocated but what it says.

    Raises:
        LinkLostError: it was damaged on its way.
        LinkError: it is no head of this version, or is cut short, or goes beyond a limit.
    """
    magic, version, check = _START.unpack(_piece(message, 0, _START.size))
    if magic != MAGIC:
        raise LinkError(f"a frame begins with {magic!r}, expected {MAGIC!r}: the other side speaks another protocol")
    if version != VERSION:
        raise LinkError(f"the frame is of version {version}, expected {VERSION}: use the same FlexP on both sides")
    begin = _START.size + _SIZES.size
    tensors, size = _SIZES.unpack(_piece(message, _START.size, begin))
    if size > MOST_TEXT:
        raise LinkError(f"the frame announces {size} bytes of text, expected at most {MOST_TEXT}")
    text = _piece(message, begin, begin + size)
    if zlib.crc32(memoryview(message)[_START.size : begin + size]) != check:
        raise LinkLostError(DAMAGED)
    try:
        table = from_json(text)
        said = table.pop("__metadata__")
        if not all(isinstance(value, str) for value in said.values()):
            raise ValueError("its metadata are not texts")
        kind, call, seconds = said.pop("message"), int(said.pop("call")), float(said.pop("seconds"))
        fields = _fields(table)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LinkError(f"the frame's head cannot be read ({type(error).__name__}: {error})") from error
    if not (0 <= call < 2**64 and math.isfinite(seconds)):
        raise LinkError(f"the frame has the number {call} and {seconds} seconds, which cannot be")
    return Head(kind, call, seconds, said, fields, begin + size, tensors)


def encode(frame: Frame) -> list[bytes]:
    """The messages of a stream that carry ``frame``; its tensors are copied, so they may change afterwards.

    Raises:
        LinkError: the head is too large.
    """
    return list(Outgoing(frame).messages(frame.head.call))


class Outgoing:
    """A frame on its way out, whose number is not known before it leaves; its tensors are copied.

    Raises:
        LinkError: the head is too large.
    """

    def __init__(self, frame: Frame) -> None:
        self._head, self._check = frame.head, 0
        self._content = [bytes(_octets(value.detach().cpu().contiguous())) for value in frame.tensors]
        for piece in self._content:
            self._check = zlib.crc32(piece, self._check)
        head_bytes(self._head, self._check)

    def messages(self, number: int) -> Iterator[bytes]:
        """As of :func:`encode`, of the call ``number``."""
        return _chunks([head_bytes(replace(self._head, call=number), self._check), *self._content])


class Incoming:
    """A frame on its way in: made of its first message, allocated once its head has been accepted, then filled.

    Raises:
        LinkError: from every method, when what arrives is not such a frame.
    """

    def __init__(self, message: bytes) -> None:
        if len(message) > CHUNK:
            raise LinkError(f"a message has {len(message)} bytes, expected at most {CHUNK}")
        self.head = parse(message)
        self._first = memoryview(message)[self.head.size :]
        self._left = self.head.size + self.head.payload
        self._check = 0
        self._expect(len(message))
        self._tensors: tuple[Tensor, ...] = ()
        self._spaces: list[memoryview] = []

    @property
    def done(self) -> bool:
        """Whether all bytes are here."""
        return self._left == 0

    def allocate(self) -> None:
        """Make the tensors, and fill them with what came with the head."""
        self._tensors = tuple(torch.empty(item.shape, dtype=item.dtype) for item in self.head.fields)
        self._spaces = [_octets(value) for value in self._tensors]
        self._fill(self._first)

    def add(self, message: bytes) -> None:
        """Fill in the next message."""
        self._expect(len(message))
        self._fill(memoryview(message))

    def frame(self) -> Frame:
        """The frame, once it is done.

        Raises:
            LinkLostError: its tensors were damaged on their way.
        """
        if self._check != self.head.check:
            raise LinkLostError(DAMAGED)
        return Frame(self.head, self._tensors)

    def _expect(self, size: int) -> None:
        expected = min(CHUNK, self._left)
        if size != expected:
            raise LinkError(f"a message has {size} bytes where the frame has {expected}")
        self._left -= size

    def _fill(self, content: memoryview) -> None:
        self._check = zlib.crc32(content, self._check)
        while len(content):
            space = self._spaces[0]
            count = min(len(space), len(content))
            space[:count] = content[:count]
            content = content[count:]
            self._spaces[0] = space[count:]
            if not len(self._spaces[0]):
                del self._spaces[0]


def signed(message: bytes) -> bytes:
    """A frame in one message with its two check sums made right, whatever else it is: for tests and fuzzing."""
    begin = _START.size + _SIZES.size
    if len(message) < begin:
        return message
    magic, version, _ = _START.unpack(message[: _START.size])
    _, size = _SIZES.unpack(message[_START.size : begin])
    text, content = message[begin : begin + size], message[begin + size :]
    rest = _SIZES.pack(zlib.crc32(content), size) + text
    return _START.pack(magic, version, zlib.crc32(rest)) + rest + content


def _piece(message: bytes, start: int, stop: int) -> bytes:
    if stop > len(message):
        raise LinkError(f"the frame's head is cut short after {len(message)} bytes")
    return message[start:stop]


def _fields(table: Mapping[str, Any]) -> tuple[Field, ...]:
    """The tensors of a safetensors text, in the order of their bytes, which leave no room between them."""
    if len(table) > MOST_FIELDS:
        raise ValueError(f"it has {len(table)} tensors, expected at most {MOST_FIELDS}")
    found: list[tuple[int, int, Field]] = []
    for name, said in table.items():
        dtype, shape, (start, stop) = TYPES[said["dtype"]], tuple(said["shape"]), said["data_offsets"]
        if len(said) > 3 or not all(type(size) is int and 0 < size < 2**32 for size in shape):
            raise ValueError(f"the tensor {name!r} has the shape {shape} and {len(said)} keys")
        if len(shape) > MOST_DIMENSIONS or len(name.encode()) > MOST_NAME:
            raise ValueError(f"a tensor has {len(shape)} dimensions and a name of {len(name)} letters")
        found.append((start, stop, Field(name, dtype, shape)))
    found.sort(key=lambda each: each[0])
    place = 0
    for start, stop, item in found:
        if start != place or stop != place + item.size:
            raise ValueError(f"the tensor {item.name!r} does not lie where the one before ends")
        place = stop
    return tuple(item for _, _, item in found)


def _chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    waiting: list[bytes | memoryview] = []
    room = CHUNK
    for piece in pieces:
        while len(piece) >= room:
            yield b"".join([*waiting, piece[:room]])
            piece, waiting, room = piece[room:], [], CHUNK
        if len(piece):
            waiting.append(piece)
            room -= len(piece)
    if waiting:
        yield b"".join(waiting)


def _octets(value: Tensor) -> memoryview:
    return memoryview(cast(Any, value.reshape(-1).view(torch.uint8).numpy()))
