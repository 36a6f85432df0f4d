"""Messages as frames, and frames as messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from torch import Tensor

from flexp.config import CodecConfig
from flexp.errors import LinkError, LinkLostError
from flexp.links.coding import Coding
from flexp.links.frames import Frame, describe
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    Done,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    Leave,
    Order,
    PullReply,
    PullRequest,
    Ready,
    Welcome,
)
from flexp.links.orders import read_order, read_ready, to_text
from flexp.links.rules import Agreement, Limits
from flexp.links.wire import Head, Kind

_JOIN = TypeAdapter(Join)
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_EMPTY: dict[type[Any], Kind] = {Abort: Kind.ABORT, Leave: Kind.LEAVE, Done: Kind.DONE}
Named = Sequence[tuple[str, Tensor | None]]


def to_frame(message: Any, call: int, seconds: float = 0.0, coding: Coding | None = None) -> Frame:
    """The frame that carries a message, except :class:`Welcome`, which :func:`welcome_frame` makes.

    With error feedback ``coding`` remembers what it coded: a frame that is sent twice is made once.

    Raises:
        LinkError: the message holds what cannot cross.
    """
    match message:
        case ForwardRequest():
            named: Named = [
                ("hidden_BTH", message.hidden_BTH),
                ("mask_BT", message.mask_BT),
                ("positions_BT", message.positions_BT),
                ("base_BTH", message.base_BTH),
                *(("inner_BTH", value) for value in message.inner_BTH),
            ]
            forward = (message.exchange, int(message.train), message.step)
            return _frame(Kind.FORWARD, call, seconds, forward, named, coding)
        case BackwardRequest():
            place = (message.exchange, message.step, message.exchanges, message.tokens, message.weight)
            return _frame(Kind.BACKWARD, call, seconds, place, [("grad_BTH", message.grad_BTH)], coding)
        case PullRequest():
            return _frame(Kind.PULL, call, seconds, (message.start, message.stop, message.step))
        case ForwardReply():
            numbers = (int(message.align is not None), message.align or 0.0)
            return _frame(Kind.FORWARD_REPLY, call, seconds, numbers, [("hidden_BTH", message.hidden_BTH)], coding)
        case BackwardReply():
            named = [("grad_BTH", message.grad_BTH), *(("inner_BTH", value) for value in message.inner_BTH)]
            return _frame(Kind.BACKWARD_REPLY, call, seconds, (), named, coding)
        case PullReply():
            return _frame(Kind.PULL_REPLY, call, seconds, (), list(message.weights.items()))
        case FetchRequest():
            return _frame(Kind.FETCH, call, seconds, (message.block, message.first, message.most))
        case FetchReply():
            numbers = (message.version, message.total)
            return _frame(Kind.FETCH_REPLY, call, seconds, numbers, list(message.weights.items()))
        case Abort() | Leave() | Done():
            return Frame(Head(_EMPTY[type(message)], call))
        case Ready() | Order():
            kind = Kind.READY if isinstance(message, Ready) else Kind.ORDER
            return Frame(Head(kind, call, text=to_text(message)))
        case ExtendRequest():
            named = [
                ("hidden_BTH", message.hidden_BTH),
                ("mask_BT", message.mask_BT),
                ("positions_BT", message.positions_BT),
                ("rows_B", message.rows_B),
            ]
            return _frame(Kind.EXTEND, call, seconds, (message.generation, message.past), named)
        case ExtendReply():
            return _frame(Kind.EXTEND_REPLY, call, seconds, (), [("hidden_BTH", message.hidden_BTH)])
        case EndGeneration():
            return Frame(Head(Kind.END_GENERATION, call, numbers=(message.generation,)))
        case Join():
            return Frame(Head(Kind.JOIN, call, text=to_json(message, inf_nan_mode="null").decode()))
    raise TypeError(f"{type(message).__name__} does not cross a link")


def to_message(frame: Frame, device: torch.device, coding: Coding | None = None) -> Any:
    """The message that a frame carries, with its tensors on ``device``; rules.py has accepted its head already.

    Raises:
        LinkError: a number or a text means nothing.
    """
    head, tensors = frame.head, [(name, value.to(device)) for name, value in frame.named()]
    if coding is not None:
        tensors = list(coding.decode(head.kind, tensors))
    one = dict(tensors)
    inner = tuple(value for name, value in tensors if name == "inner_BTH")
    match head.kind:
        case Kind.FORWARD:
            exchange, train, step = head.numbers
            return ForwardRequest(
                exchange, one["hidden_BTH"], one.get("mask_BT"), one.get("positions_BT"), one.get("base_BTH"),
                inner, bool(train), step,
            )  # fmt: skip
        case Kind.BACKWARD:
            exchange, step, exchanges, tokens, weight = head.numbers
            return BackwardRequest(exchange, one["grad_BTH"], step, exchanges, tokens, weight)
        case Kind.PULL:
            return PullRequest(*head.numbers)
        case Kind.FORWARD_REPLY:
            due, align = head.numbers
            return ForwardReply(one["hidden_BTH"], align if due else None)
        case Kind.BACKWARD_REPLY:
            return BackwardReply(one["grad_BTH"], inner)
        case Kind.PULL_REPLY:
            return PullReply(one)
        case Kind.FETCH:
            return FetchRequest(*head.numbers)
        case Kind.FETCH_REPLY:
            version, total = head.numbers
            return FetchReply(version, total, one)
        case Kind.ABORT:
            return Abort()
        case Kind.LEAVE:
            return Leave()
        case Kind.DONE:
            return Done()
        case Kind.READY:
            return read_ready(head.text)
        case Kind.ORDER:
            return read_order(head.text)
        case Kind.EXTEND:
            generation, past = head.numbers
            return ExtendRequest(
                generation, past, one["hidden_BTH"], one.get("mask_BT"), one.get("positions_BT"), one.get("rows_B")
            )
        case Kind.EXTEND_REPLY:
            return ExtendReply(one["hidden_BTH"])
        case Kind.END_GENERATION:
            return EndGeneration(*head.numbers)
        case Kind.JOIN:
            return _join(head.text)
    raise TypeError(f"{head.kind.name} carries no message")


def welcome_frame(welcome: Welcome, limits: Limits, call: int) -> Frame:
    """The answer to a client that was let in, with the limits that it should keep to."""
    text = to_json({
        "welcome": asdict(welcome),
        "limits": {"max_tokens": limits.max_tokens, "frame_bytes": limits.frame_bytes},
    })  # fmt: skip
    return Frame(Head(Kind.WELCOME, call, text=text.decode()))


def read_welcome(text: str, join: Join) -> tuple[Welcome, Agreement]:
    """What :func:`welcome_frame` said.

    Raises:
        LinkError: it is something else.
    """
    try:
        said = from_json(text)
        welcome = Welcome(**{item.name: _count(said["welcome"][item.name]) for item in fields(Welcome)})
        limits = Limits(**{name: _count(said["limits"][name]) for name in ("max_tokens", "frame_bytes")})
    except (ValueError, TypeError, KeyError) as error:
        raise LinkError(f"the server's welcome cannot be read ({error})") from error
    return welcome, agree(join, welcome, limits)


def agree(join: Join, welcome: Welcome, limits: Limits) -> Agreement:
    """What holds for all frames after a client was let in."""
    return Agreement(
        dtype_of(join), welcome.hidden, welcome.blocks, limits.max_tokens, limits.frame_bytes,
        join.codec or CodecConfig(),
    )  # fmt: skip


def dtype_of(join: Join) -> torch.dtype:
    """The type that a client's model computes in."""
    if join.dtype not in _DTYPES:
        raise LinkError(f"activations of {join.dtype} cannot cross; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[join.dtype]


def error_frame(error: Exception | str, call: int = 0) -> Frame:
    """A refusal of one request, or (``call`` = 0) of the whole stream; it says if trying again may help."""
    said = {"error": str(error)[:4000]} | ({"again": True} if isinstance(error, LinkLostError) else {})
    return Frame(Head(Kind.ERROR, call, text=to_json(said).decode()))


def read_error(text: str) -> LinkError:
    """The refusal that :func:`error_frame` carries, with the words of the other side."""
    try:
        said = from_json(text)
        return (LinkLostError if said.get("again") is True else LinkError)(str(said["error"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return LinkError("the other side refused, and gives no readable reason")


def _frame(
    kind: Kind, call: int, seconds: float, numbers: tuple[Any, ...], named: Named = (), coding: Coding | None = None
) -> Frame:
    present = [(name, value) for name, value in named if value is not None]
    if coding is not None:
        present = list(coding.encode(kind, present))
    head = Head(kind, call, seconds, numbers, fields=tuple(describe(name, value) for name, value in present))
    return Frame(head, tuple(value for _, value in present))


def _join(text: str) -> Join:
    try:
        said = from_json(text)
        odd = sorted(said.keys() ^ {item.name for item in fields(Join)})
        if odd:
            raise ValueError(f"{odd[0]} is missing or unknown")
        return _JOIN.validate_python(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LinkError(f"the joining message cannot be read: {where}: {first['msg']}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise LinkError(f"the joining message cannot be read ({error})") from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
