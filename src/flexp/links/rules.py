"""What each side accepts of a frame, decided on its head alone: before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch

from flexp.errors import LinkError
from flexp.links.wire import Field, Head, Kind

REQUESTS = {Kind.JOIN, Kind.FORWARD, Kind.BACKWARD, Kind.PULL, Kind.ABORT, Kind.LEAVE} | {
    Kind.EXTEND,
    Kind.END_GENERATION,
}
ANSWERS = {
    Kind.JOIN: Kind.WELCOME,
    Kind.FORWARD: Kind.FORWARD_REPLY,
    Kind.BACKWARD: Kind.BACKWARD_REPLY,
    Kind.PULL: Kind.PULL_REPLY,
    Kind.ABORT: Kind.DONE,
    Kind.LEAVE: Kind.DONE,
    Kind.EXTEND: Kind.EXTEND_REPLY,
    Kind.END_GENERATION: Kind.DONE,
}
_TEXTS = {Kind.JOIN, Kind.WELCOME, Kind.ERROR}


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
    """

    max_tokens: int = 32_768
    frame_bytes: int = 256 << 20
    memory_bytes: int = 1 << 30
    unanswered: int = 16
    frame_seconds: float = 60.0
    join_seconds: float = 30.0


@dataclass(frozen=True)
class Agreement:
    """What was agreed on joining: every activation is (B, T, ``hidden``) of ``dtype`` with B·T ≤ ``max_tokens``."""

    dtype: torch.dtype
    hidden: int
    blocks: int
    max_tokens: int
    frame_bytes: int


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
        raise LinkError(f"client {client} has not joined: call link.join first")
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
    if head.kind == Kind.PULL_REPLY:
        _check_weights(head, agreement)
        return
    sent = [item for item in asked.fields if item.name in ("hidden_BTH", "grad_BTH")]
    given = [(item.dtype, item.shape, item.packed) for item in head.fields]
    wanted = {(item.dtype, item.shape, False) for item in sent}
    names = [item.name for item in head.fields]
    first = {Kind.BACKWARD_REPLY: ["grad_BTH"]}.get(head.kind, ["hidden_BTH"] if sent else [])
    inner = names[len(first) :]
    most = agreement.blocks if agreement and head.kind == Kind.BACKWARD_REPLY else 0
    fits = names[: len(first)] == first and set(inner) <= {"inner_BTH"} and len(inner) <= most
    if not fits or not set(given) <= wanted:
        raise LinkError(
            f"the server answers {asked.kind.name} of {_facts(sent)} with {_facts(head.fields)}, expected the same size"
        )


def _check_activations(head: Head, agreement: Agreement, client: str) -> None:
    main = next(item for item in head.fields if item.name in ("hidden_BTH", "grad_BTH"))
    what = "activation" if main.name == "hidden_BTH" else "gradient"
    shape = main.shape
    if len(shape) != 3 or shape[2] != agreement.hidden or main.dtype != agreement.dtype or main.packed:
        raise LinkError(
            f"client {client}: the {what} is {_fact(main)}, expected (B, T, {agreement.hidden}) {agreement.dtype}"
        )
    if shape[0] * shape[1] > agreement.max_tokens:
        raise LinkError(
            f"client {client}: the {what} has {shape[0]} × {shape[1]} tokens, the server takes at most "
            f"{agreement.max_tokens}; use smaller (micro-)batches or shorter texts"
        )
    rows = {shape[:2], (1, shape[1])}
    for item in head.fields:
        if item.name == "mask_BT":
            fits = item.packed and item.shape == shape[:2]
        elif item.name == "positions_BT":
            fits = item.shape in rows and item.dtype == torch.int64 and not item.packed
        elif item.name == "rows_B":
            fits = item.shape == shape[:1] and item.dtype == torch.int64 and not item.packed
        else:
            fits = item.shape == shape and item.dtype == main.dtype and not item.packed
        if not fits:
            raise LinkError(f"client {client}: {item.name} is {_fact(item)}, which does not go with {_fact(main)}")
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
    counts = Counter(item.name for item in head.fields)
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
