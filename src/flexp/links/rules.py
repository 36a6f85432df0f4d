"""What each side accepts of a frame, decided on its head alone: before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from flexp.config import CodecConfig
from flexp.errors import LinkError
from flexp.links.codecs import SCALE, codec_of
from flexp.links.coding import codec_name
from flexp.links.declaring import MESSAGES, Entry, Request, Tensors, declared
from flexp.links.frames import Field, Head
from flexp.links.messages import BackwardReply, Join, Leave, Refusal, Welcome
from flexp.links.passing import PassedReply

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class Limits:
    """What a server lets one frame, one client and all clients together take.

    Attributes:
        max_tokens: batch × length of an exchange.
        frame_bytes: tensors of one frame.
        memory_bytes: tensors of all clients' frames that arrive or wait for their answer; more wait outside.
        unanswered: requests of a client that wait for their answer; more wait outside.
        frame_seconds: between two messages of one frame, either way.
        slowest_bytes_per_second: a whole frame may take ``frame_seconds``, and its bytes at this rate, either way. One
            that is larger than a client's share of the memory has ``frame_seconds`` alone while others wait for memory.
        join_seconds: for a client to join after it has connected.
        requests_per_second: of a client; one that sends faster is slowed down.
        bytes_per_second: likewise, of tensors.
        burst_seconds: what so many seconds allow may come at once.
    """

    max_tokens: int = 32_768
    frame_bytes: int = 256 << 20
    memory_bytes: int = 1 << 30
    unanswered: int = 16
    frame_seconds: float = 60.0
    slowest_bytes_per_second: float = 32 << 10
    join_seconds: float = 30.0
    requests_per_second: float = 1000.0
    bytes_per_second: float = math.inf
    burst_seconds: float = 2.0

    def seconds(self, size: int) -> float:
        """That a whole frame of ``size`` bytes may take."""
        return self.frame_seconds + size / self.slowest_bytes_per_second

    def told(self, welcome: Welcome) -> Welcome:
        """A welcome that tells the client what it has to keep to."""
        return replace(welcome, max_tokens=self.max_tokens, frame_bytes=self.frame_bytes)


def bounded(welcome: Welcome) -> Welcome:
    """A welcome with no larger frames than there is memory for, whatever the server names."""
    return replace(welcome, frame_bytes=min(welcome.frame_bytes, Limits().frame_bytes))


@dataclass(frozen=True)
class Agreement:
    """What was agreed on joining: every activation is (B, T, ``hidden``) of ``dtype`` with B·T ≤ ``max_tokens``.

    ``codec`` says as what it crosses.
    """

    dtype: torch.dtype
    hidden: int
    blocks: int
    max_tokens: int
    frame_bytes: int
    codec: CodecConfig = field(default_factory=CodecConfig)

    @classmethod
    def of(cls, join: Join, welcome: Welcome) -> Agreement:
        """What holds for all frames after a client was let in."""
        return cls(
            dtype_of(join), welcome.hidden, welcome.blocks, welcome.max_tokens, welcome.frame_bytes,
            join.codec or CodecConfig(),
        )  # fmt: skip

    def forms(self, entry: Entry, name: str, rows: tuple[int, ...], mask: tuple[int, ...]) -> list[list[Field]]:
        """As what a tensor of a message with (B, T) = ``rows`` and (b, t) = ``mask`` may cross: payload and scales, in
        each of its shapes."""
        return _forms(entry.tensors, codec_name(self.codec, entry.tensors), self.dtype, self.hidden, name, rows, mask)


@lru_cache(maxsize=1024)
def _forms(
    tensors: Tensors,
    codec: str,
    dtype: torch.dtype,
    hidden: int,
    name: str,
    rows: tuple[int, ...],
    mask: tuple[int, ...],
) -> list[list[Field]]:
    sizes = dict(zip("BTbt1H", (*rows, *mask, 1, hidden), strict=True))
    forms = []
    for letters in tensors.shapes:
        shape = tuple(sizes[letter] for letter in letters)
        fixed = torch.uint8 if tensors.flags else tensors.dtype
        parts = codec_of(codec, dtype).layout(shape) if fixed is None else ((fixed, shape),)
        forms.append([Field(part, *what) for part, what in zip((name, name + SCALE), parts, strict=False)])
    return forms


def dtype_of(join: Join) -> torch.dtype:
    """The type that a client's model computes in."""
    if join.dtype not in DTYPES:
        raise LinkError(f"activations of {join.dtype} cannot cross; expected one of {', '.join(DTYPES)}")
    return DTYPES[join.dtype]


def check_request(head: Head, agreement: Agreement | None, client: str) -> None:
    """Refuse a client's frame that was not agreed on; before joining (``None``), everything but joining.

    Raises:
        LinkError: see above.
    """
    kind = MESSAGES.get(head.message)
    if kind is None or not issubclass(kind, Request):
        raise LinkError(f"client {client}: a {head.message[:40]!r} frame does not come from a client")
    if not head.call:
        raise LinkError(f"client {client}: a request has the number 0, expected 1 or more")
    if agreement is None and kind not in (Join, Leave):
        raise LinkError(f"client {client} has not joined: Join comes first")
    _check(head, kind, agreement, f"client {client}", None)


def check_reply(head: Head, asked: Head, agreement: Agreement | None, reads: int | None = None) -> None:
    """Refuse a server's frame that does not answer the request ``asked``.

    Args:
        reads: rows that it asked for; ``None``: as many as it has itself. Those of a backward's answer are its
            forward's, and judged later (:mod:`flexp.client.exchange`).

    Raises:
        LinkError: see above.
    """
    expected: type[Any] = MESSAGES[asked.message].reply
    if head.message not in (expected.__name__, Refusal.__name__):
        raise LinkError(f"the server answers {asked.message} with {head.message[:40]!r}, expected {expected.__name__}")
    main = next((item.shape[:2] for item in asked.fields if len(item.shape) == 3), None)
    if reads is not None or expected in (BackwardReply, PassedReply):
        main = None if reads is None else (1, reads)
    _check(head, MESSAGES[head.message], agreement, "the server", main)


def _check(head: Head, kind: type[Any], agreement: Agreement | None, who: str, rows: tuple[int, ...] | None) -> None:
    """Every tensor must be declared, of the size (B, T) = ``rows`` or else of the first one's, as its codec has it."""
    left = {item.name: item for item in head.fields}
    mask = _mask(left.get("mask_BT"), agreement)
    # What (B, T) is, an activation says before all others.
    entries = sorted(declared(kind).entries, key=lambda entry: "BTH" not in entry.tensors.shapes)
    for entry in entries if agreement is not None else ():
        assert agreement is not None
        names = entry.names(left)
        if entry.needed and not names:
            raise LinkError(f"{who}: a {head.message} frame has no {entry.field}: it has {_list(left)}")
        if entry.holds == "many" and len(names) > agreement.blocks:
            raise LinkError(
                f"{who}: a {head.message} frame has {len(names)} {entry.field}, more than the model's blocks"
            )
        for name in names:
            found = left.pop(name)
            if not entry.tensors.shapes:
                wanted = entry.tensors.dtype
                if not (found.dtype.is_floating_point if wanted is None else found.dtype == wanted):
                    raise LinkError(f"{who}: {name} is {found.dtype}, expected {wanted or 'weights'}")
                continue
            if rows is None and name == "mask_BT":
                rows = mask  # nothing came with it
            first = rows is None
            rows = found.shape[:2] if rows is None else rows
            forms = agreement.forms(entry, name, rows, _packs(rows, mask)) if len(rows) == 2 else [[found]]
            if first:
                _check_first(found, forms[0][0], agreement, who)
            given = [found, *(left.pop(part) for part in (name + SCALE,) if len(forms[0]) > 1 and part in left)]
            if given not in forms:
                raise LinkError(f"{who}: {_facts(given)}, expected {' or '.join(map(_facts, forms))}")
    if left or len({item.name for item in head.fields}) < len(head.fields):
        known = ", ".join(entry.field for entry in declared(kind).entries) or "none"
        raise LinkError(f"{who}: a {head.message} frame has the tensors {_list(left)}, expected {known}, each once")
    if agreement is not None and head.payload > agreement.frame_bytes:
        raise LinkError(
            f"{who}: the frame has {head.payload} bytes, at most {agreement.frame_bytes} are taken; "
            "use smaller (micro-)batches"
        )


def _mask(found: Field | None, agreement: Agreement | None) -> tuple[int, ...] | None:
    """(b, t) of a message, if it has a mask of a size that may be."""
    fits = found is not None and agreement is not None and len(found.shape) == 2
    return found.shape if fits and math.prod(found.shape) <= agreement.max_tokens else None  # type: ignore[union-attr]


def _packs(rows: tuple[int, ...], mask: tuple[int, ...] | None) -> tuple[int, ...]:
    """(b, t) of a message: its mask's, if its tokens may be those under it."""
    return mask if mask is not None and rows[0] == 1 and rows[1] <= math.prod(mask) else rows


def _check_first(found: Field, expected: Field, agreement: Agreement, who: str) -> None:
    """The first tensor of a message says what (B, T) is."""
    if len(found.shape) != 3 or found != expected:
        wanted = f"(B, T, {expected.shape[-1]}) {expected.dtype}" if len(found.shape) == 3 else "(B, T, H)"
        raise LinkError(f"{who}: {found.name} is {found.shape} {found.dtype}, expected {wanted}")
    batch, length, _ = found.shape
    if batch * length > agreement.max_tokens:
        raise LinkError(
            f"{who}: {found.name} has {batch} × {length} tokens, the server takes at most "
            f"{agreement.max_tokens}; use smaller (micro-)batches or shorter texts"
        )


def _facts(items: Collection[Field]) -> str:
    return " with ".join(f"{item.name} {item.shape} {item.dtype}" for item in items)


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "none"
