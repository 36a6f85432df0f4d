"""Frames as messages of a stream: heads (:mod:`flexp.links.wire`) with the bytes of their tensors.

A frame travels as messages of exactly :data:`~flexp.links.wire.CHUNK` bytes, the last one shorter; the head is always
within the first. So a receiver knows all sizes, and can refuse, before it allocates anything; then bytes go straight
into the tensors that will be used. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flexp.errors import LinkError, LinkLostError
from flexp.links.wire import CHUNK, CODES, DAMAGED, Field, Head, head_bytes, parse


@dataclass(frozen=True)
class Frame:
    """A head with its tensors, one for each of its fields."""

    head: Head
    tensors: tuple[Tensor, ...] = ()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in order."""
        return ((item.name, value) for item, value in zip(self.head.fields, self.tensors, strict=True))


def describe(name: str, value: Tensor) -> Field:
    """The field that carries ``value``.

    Raises:
        LinkError: tensors of this type cannot cross.
    """
    if value.dtype not in CODES:
        raise LinkError(f"{name} is {value.dtype}, which cannot cross; use {', '.join(map(str, CODES))}")
    return Field(name, value.dtype, tuple(value.shape), packed=name == "mask_BT")


def encode(frame: Frame) -> list[bytes]:
    """The messages that carry ``frame``; its tensors are copied, so they may change afterwards.

    Raises:
        LinkError: a name, a number or a text has no place in a frame, or a mask is not made of zeros and ones.
    """
    content = [_bytes_of(item, value) for item, value in zip(frame.head.fields, frame.tensors, strict=True)]
    check = 0
    for piece in content:
        check = zlib.crc32(piece, check)
    return list(_chunks([head_bytes(replace(frame.head, check=check)), *content]))


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
        self._tensors: list[Tensor] = []
        self._spaces: list[memoryview] = []

    @property
    def done(self) -> bool:
        """Whether all bytes are here."""
        return self._left == 0

    def allocate(self) -> None:
        """Make the tensors, and fill them with what came with the head."""
        for item in self.head.fields:
            value = torch.empty(item.shape, dtype=torch.uint8 if item.packed else item.dtype)
            self._tensors.append(value)
            self._spaces.append(_octets(value))
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
        return Frame(self.head, tuple(map(_restored, self.head.fields, self._tensors)))

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


def _bytes_of(item: Field, value: Tensor) -> memoryview:
    value = value.detach().cpu()
    if item.packed:
        if not bool(((value == 0) | (value == 1)).all()):
            raise LinkError(f"{item.name} holds other values than 0 and 1")
        value = value.to(torch.uint8)
    return _octets(value.contiguous())


def _restored(item: Field, value: Tensor) -> Tensor:
    if not item.packed:
        return value
    if int(value.max()) > 1:
        raise LinkError(f"{item.name} holds other values than 0 and 1")
    return value.to(item.dtype)


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
