"""Inputs for fuzzing: what an honest client sends, and how that is spoilt.

An input is one byte, which says in what state the client is and how its bytes are cut into messages, and then a frame,
or, for :data:`HANDSHAKE`, the metadata of a stream. Everything is a function of the random generator that is given.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from dataclasses import replace

import torch

from flexp.config import AlignConfig, CodecConfig, LoraConfig
from flexp.errors import LinkError
from flexp.links.asking import EndGeneration, ExtendRequest, FetchRequest, PullRequest
from flexp.links.coding import Coding
from flexp.links.declaring import MESSAGES
from flexp.links.frames import TYPES, Field, Head, encode, head_bytes, parse, signed
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Join, Leave, Ready

STRANGER, HANDSHAKE = 0, 7
CODECS: dict[int, CodecConfig] = {
    1: CodecConfig(),
    2: CodecConfig.all("int8-row", error_feedback=True),
    3: CodecConfig.all("int4"),
    4: CodecConfig(aligned="bf16"),
    5: CodecConfig(activation="fp8", gradient="fp16"),
    6: CodecConfig(),
}
"""The states in which a client has joined; in the last, its forward :data:`IN_FLIGHT` waits for its backward."""
ALIGNED = 4
IN_FLIGHT = 5
MOST = 4096
"""Bytes of an input."""
RAW, CUT = 0x38, 0xC0
"""The bits of the first byte that say: leave the check sums wrong (when none is set); cut the messages wrongly."""
DAMAGED = 0.6
"""The share of inputs whose check sums are left wrong, as a network's damage leaves them; a liar's are right."""

_NUMBERS = (0, 1, 2, 3, 5, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e308, 3.5e38, math.nan, math.inf, -math.inf)


def seeds(join: Join) -> list[bytes]:
    """An input for each state and kind of request."""
    draw = torch.Generator().manual_seed(0)

    def value(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    mask, positions = torch.tensor([[1, 1]]), torch.tensor([[0, 1]])
    found = [bytes([HANDSHAKE]) + bytes([len(name)]) + name + b"secret" for name in (b"a", "Süd".encode(), b"\xff")]
    for state in (STRANGER, *CODECS):
        align = AlignConfig(kind="kl", at="every-block", teach=True) if state == ALIGNED else AlignConfig(kind="off")
        card = replace(join, client=name_of(state), align=align, codec=CODECS.get(state), lora=LoraConfig())
        coding = Coding(CODECS.get(state), torch.float32, 32)
        inner = (value(1, 2, 32),) if state == ALIGNED else ()
        base = value(1, 2, 32) if state == ALIGNED else None
        messages = [
            card,
            ForwardRequest(9, value(1, 2, 32), mask, positions, base, inner, train=True, step=3),
            ForwardRequest(2, value(2, 1, 32), train=False),
            BackwardRequest(IN_FLIGHT, value(1, 2, 32), step=3, exchanges=1, tokens=0.5, weight=1.0),
            PullRequest(1, 2, 3),
            FetchRequest(2, 0, 4096),
            ExtendRequest(4, 0, value(1, 2, 32), mask, positions),
            ExtendRequest(4, 2, value(1, 1, 32)),
            EndGeneration(4),
            Abort(),
            Ready(3, 2, "run", (1,), 2, {"loss": 1.0}),
            Leave(),
        ]
        frames = [b"".join(encode(coding.frame(message, 7))) for message in messages]
        found += [bytes([state | RAW]) + frame for frame in frames]
    return found


def name_of(state: int) -> str:
    """The client that is in this state."""
    return f"client {state}"


def mutated(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes:
    """``data`` spoilt in one to three ways, of bytes or of what they mean."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(_CHANGES)
        data = change(data, draw, pool) or data
    if draw.random() < DAMAGED:
        data = bytes([data[0] & ~RAW]) + data[1:]
    return data[:MOST]


def _flipped(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(min(len(spoilt), draw.choice((1, 40, 120, len(spoilt)))) or 1)
        spoilt[place] ^= 1 << draw.randrange(8)
    return bytes(spoilt)


def _cut(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    return data[: draw.randrange(1, len(data) + 1)]


def _spliced(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes:
    other = draw.choice(pool)
    return data[: draw.randrange(1, len(data) + 1)] + other[draw.randrange(len(other)) :]


def _overwritten(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    number, width = draw.choice(_NUMBERS), draw.choice((1, 2, 4, 8))
    piece = (number % (1 << 8 * width)).to_bytes(width, "little")
    place = draw.randrange(1, len(data) + 1)
    return data[:place] + piece + data[place + draw.choice((0, width)) :]


def _moved(data: bytes, draw: random.Random, _: list[bytes]) -> bytes:
    """The same frame in another state, or cut into other messages, or with its check sums left wrong."""
    return bytes([draw.randrange(256)]) + data[1:]


def _renumbered(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes | None:
    def change(head: Head) -> Head:
        scalars = {
            name: str(draw.choice(_REALS if "." in text else _NUMBERS)) if draw.random() < 0.5 else text
            for name, text in head.scalars.items()
        }
        return replace(head, scalars=scalars, call=draw.choice((head.call, draw.choice(_NUMBERS))))

    return _rebuilt(data, draw, change)


def _rekinded(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes | None:
    return _rebuilt(data, draw, lambda head: replace(head, message=draw.choice([*MESSAGES, ""])))


def _reshaped(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes | None:
    def change(head: Head) -> Head:
        fields = list(head.fields)
        if not fields:
            return head
        place = draw.randrange(len(fields))
        item = fields[place]
        match draw.randrange(5):
            case 0:
                fields[place] = replace(item, dtype=draw.choice(list(TYPES.values())))
            case 1:
                shape = [draw.choice((size, 1, 2, 3, 33)) for size in item.shape]
                fields[place] = replace(item, shape=tuple(shape[: draw.randrange(9)]))
            case 2:
                names = ("hidden_BTH", "grad_BTH", "mask_BT", "inner_BTH.1", "rows_B", "hidden_BTH.scale", "", "é")
                fields[place] = replace(item, name=draw.choice(names))
            case 3:
                fields.insert(place, Field("rows_B", torch.int64, (draw.randrange(1, 4),)))
            case _:
                del fields[place]
        return replace(head, fields=tuple(fields))

    return _rebuilt(data, draw, change)


def _revalued(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes | None:
    """Numbers in the tensors that computing may stumble over."""
    try:
        size = parse(data[1:]).size + 1
    except LinkError:
        return None
    if size + 4 > len(data):
        return None
    spoilt = bytearray(data)
    for _ in range(draw.choice((1, 4, 64))):
        place = size + 4 * draw.randrange((len(data) - size) // 4)
        spoilt[place : place + 4] = struct.pack(
            "<f", min(3.4e38, value) if (value := draw.choice(_REALS)) > 1 else value
        )
    return bytes(spoilt)


def _reworded(data: bytes, draw: random.Random, pool: list[bytes]) -> bytes | None:
    """Another value, or another key, in the JSON text of a scalar."""

    def change(head: Head) -> Head:
        if not head.scalars:
            return head
        name = draw.choice(list(head.scalars))
        pieces = head.scalars[name].split(draw.choice((":", ",", '"', "{")))
        values = ("null", "-1", "1e999", "9" * 400, "[" * 200, "{}", '""', "true", '"\\ud800"', "1.5", "NaN", "é" * 300)
        pieces[draw.randrange(len(pieces))] = draw.choice(values)
        text = draw.choice((":", ",", '"')).join(pieces)
        return replace(head, scalars={**head.scalars, draw.choice((name, name, "odd")): text})

    return _rebuilt(data, draw, change)


def _rebuilt(data: bytes, draw: random.Random, change: Callable[[Head], Head]) -> bytes | None:
    """The frame with a changed head; its payload is left as it was, or made to fit."""
    try:
        head = parse(signed(data[1:]))
        content = data[1 + head.size :]
        head = change(head)
        start = head_bytes(head)
    except (LinkError, struct.error, UnicodeEncodeError):
        return None
    if draw.random() < 0.7 and head.payload < MOST:
        content = (content + bytes(head.payload))[: head.payload]
    return data[:1] + start + content


_CHANGES: tuple[Callable[[bytes, random.Random, list[bytes]], bytes | None], ...] = (
    _flipped, _flipped, _cut, _spliced, _overwritten, _overwritten, _moved, _renumbered, _rekinded, _reshaped,
    _reshaped, _revalued, _reworded,
)  # fmt: skip
