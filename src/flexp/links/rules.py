"""What each side accepts of a frame, decided on its head alone: before anything is allocated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from flexp.config import CodecConfig
from flexp.errors import LinkError
from flexp.links.codecs import SCALE, codec_of
from flexp.links.coding import codec_name
from flexp.links.wire import Field, Head, Kind

REQUESTS = {Kind.JOIN, Kind.FORWARD, Kind.BACKWARD, Kind.PULL, Kind.ABORT, Kind.LEAVE} | {
    Kind.EXTEND,
    Kind.END_GENERATION,
    Kind.READY,
    Kind.FETCH,
}
ANSWERS = {
    Kind.JOIN: Kind.WELCOME,
    Kind.FORWARD: Kind.FORWARD_REPLY,
    Kind.BACKWARD: Kind.BACKWARD_REPLY,
    Kind.PULL: Kind.PULL_REPLY,
    Kind.ABORT: Kind.DONE,
    Kind.LEAVE: Kind.DONE,
    Kind.READY: Kind.ORDER,
    Kind.EXTEND: Kind.EXTEND_REPLY,
    Kind.END_GENERATION: Kind.DONE,
    Kind.FETCH: Kind.FETCH_REPLY,
}
_TEXTS = {Kind.JOIN, Kind.WELCOME, Kind.ERROR, Kind.READY, Kind.ORDER}


@dataclass(frozen=True)
class Limits:
    """What a server lets one frame, one client and all clients together take.

    Attributes:
        max_tokens: batch × length of an exchange.
        frame_bytes: tensors of one frame.
        memory_bytes: tensors of all clients' frames that arrive or wait for their answer; more wait outside.
        unanswered: requests of a client that wait for their answer; more wait outside.
        frame_seconds: between two messages of one frame, and for a client to take an answer.
        join_seconds: for a client to join after it has connected.
        requests_per_second: of a client; one that sends faster is read more slowly.
        bytes_per_second: likewise, of tensors.
        burst_seconds: what so many seconds allow may come at once.
    """

    max_tokens: int = 32_768
    frame_bytes: int = 256 << 20
    memory_bytes: int = 1 << 30
    unanswered: int = 16
    frame_seconds: float = 60.0
    join_seconds: float = 30.0
    requests_per_second: float = 1000.0
    bytes_per_second: float = math.inf
    burst_seconds: float = 2.0


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

    def layout(self, kind: Kind, name: str, rows: tuple[int, ...]) -> list[Field]:
        """The fields, payload and scales, of an activation or gradient of (B, T) = ``rows``."""
        codec = codec_of(codec_name(self.codec, kind, name) or "off", self.dtype)
        parts = codec.layout((*rows, self.hidden))
        return [Field(part, *what) for part, what in zip((name, name + SCALE), parts, strict=False)]


def check_request(head: Head, agreement: Agreement | None, client: str) -> None:
    """Refuse a client's frame that was not agreed on; before joining (``None``), everything but joining.

    Raises:
        LinkError: see above.
    """
    if head.kind not in REQUESTS:
        raise LinkError(f"client {client}: a frame of kind {head.kind.name} does not come from a client")
    if not head.call:
        raise LinkError(f"client {client}: a request has the number 0, expected 1 or more")
    if head.kind not in _TEXTS and head.text:
        raise LinkError(f"client {client}: a {head.kind.name} frame has a text, expected none")
    if agreement is None and head.kind not in (Kind.JOIN, Kind.LEAVE):
        raise LinkError(f"client {client} has not joined: Join comes first")
    if agreement is None or head.kind not in (Kind.FORWARD, Kind.BACKWARD, Kind.EXTEND):
        _no_tensors(head, client)
        return
    if head.kind == Kind.FORWARD:
        _names(head, client, "hidden_BTH", optional=("mask_BT", "positions_BT", "base_BTH", "inner_BTH"))
    elif head.kind == Kind.EXTEND:
        _names(head, client, "hidden_BTH", optional=("mask_BT", "positions_BT", "rows_B"))
    else:
        _names(head, client, "grad_BTH")
    _check_activations(head, agreement, client)


def check_reply(head: Head, asked: Head, agreement: Agreement | None) -> None:
    """Refuse a server's frame that does not answer the request ``asked``.

    Raises:
        LinkError: see above.
    """
    if head.kind == Kind.ERROR:
        _no_tensors(head, "server")
        return
    expected = ANSWERS[asked.kind]
    if head.kind != expected:
        raise LinkError(f"the server answers {asked.kind.name} with {head.kind.name}, expected {expected.name}")
    if head.kind in (Kind.PULL_REPLY, Kind.FETCH_REPLY):
        _check_weights(head, agreement)
        return
    sent = next((item for item in asked.fields if item.name in ("hidden_BTH", "grad_BTH")), None)
    wanted: list[Field] = []
    if sent is not None and agreement is not None:
        wanted = agreement.layout(head.kind, sent.name, sent.shape[:2])
        inner = agreement.layout(head.kind, "inner_BTH", sent.shape[:2])
        count, odd = divmod(len(head.fields) - len(wanted), len(inner))
        most = agreement.blocks if head.kind == Kind.BACKWARD_REPLY else 0
        wanted += inner * count if not odd and 0 < count <= most else []
    if list(head.fields) != wanted:
        raise LinkError(
            f"the server answers {asked.kind.name} of {_facts([sent] if sent else [])} with {_facts(head.fields)}, "
            "expected the same size, as the codecs have it"
        )


def _check_activations(head: Head, agreement: Agreement, client: str) -> None:
    """Every activation and gradient must be of the size of the first, in the form that its codec has it."""
    main = next(item for item in head.fields if item.name in ("hidden_BTH", "grad_BTH"))
    what = "activation" if main.name == "hidden_BTH" else "gradient"
    rows = main.shape[:2]
    payload, *_ = agreement.layout(head.kind, main.name, rows)
    if len(main.shape) != 3 or main != payload:
        expected = ", ".join(["B", "T", *map(str, payload.shape[2:])])
        raise LinkError(f"client {client}: the {what} is {_fact(main)}, expected ({expected}) {payload.dtype}")
    if rows[0] * rows[1] > agreement.max_tokens:
        raise LinkError(
            f"client {client}: the {what} has {rows[0]} × {rows[1]} tokens, the server takes at most "
            f"{agreement.max_tokens}; use smaller (micro-)batches or shorter texts"
        )
    due: list[Field] = []  # the scales that must come next
    for item in head.fields:
        if due:
            fits = item == due.pop(0)
        elif item.name == "mask_BT":
            fits = item.packed and item.shape == rows
        elif item.name == "positions_BT":
            fits = item.shape in {rows, (1, rows[1])} and item.dtype == torch.int64 and not item.packed
        elif item.name == "rows_B":
            fits = item.shape == rows[:1] and item.dtype == torch.int64 and not item.packed
        else:
            first, *due = agreement.layout(head.kind, item.name, rows)
            fits = item == first and not item.name.endswith(SCALE)
        if not fits:
            raise LinkError(f"client {client}: {item.name} is {_fact(item)}, which does not go with {_fact(main)}")
    if due:
        raise LinkError(f"client {client}: the {head.kind.name} frame ends where {due[0].name} should be")
    if head.payload > agreement.frame_bytes:
        raise LinkError(
            f"client {client}: the frame has {head.payload} bytes, the server takes at most {agreement.frame_bytes}; "
            "use smaller (micro-)batches"
        )


def _check_weights(head: Head, agreement: Agreement | None) -> None:
    names = [item.name for item in head.fields]
    odd = [item for item in head.fields if not item.dtype.is_floating_point or item.packed]
    most = agreement.frame_bytes if agreement else 0
    if odd or len(set(names)) < len(names) or head.payload > most:
        raise LinkError(
            f"the server sends weights that cannot be used: {len(names)} tensors of {head.payload} bytes "
            f"(at most {most} are taken), of which {len(odd)} are no weights"
        )


def _names(head: Head, client: str, needed: str, optional: Collection[str] = ()) -> None:
    counts = Counter(item.name for item in head.fields if not item.name.endswith(SCALE))  # the codec says about these
    odd = [name for name in counts if name != needed and name not in optional]
    twice = [name for name, count in counts.items() if count > 1 and name != "inner_BTH"]
    if odd or twice or not counts[needed]:
        raise LinkError(
            f"client {client}: a {head.kind.name} frame has the fields {sorted(counts.elements())[:8]}, expected "
            f"{needed} and none but {', '.join(optional) or 'that'} besides, each once"
        )


def _no_tensors(head: Head, who: str) -> None:
    if head.fields:
        raise LinkError(f"{who}: a {head.kind.name} frame has {len(head.fields)} tensors, expected none")


def _facts(items: Collection[Field]) -> str:
    return ", ".join(f"{item.name} {_fact(item)}" for item in list(items)[:4]) or "nothing"


def _fact(item: Field) -> str:
    return f"{item.shape} {item.dtype}"
