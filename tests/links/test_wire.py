"""Bytes from a stranger: what is not exactly what was agreed on is refused, and nothing comes of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.config import AlignConfig, LoraConfig
from flexp.errors import LinkError, LinkLostError
from flexp.links import frames
from flexp.links.frames import Frame, Incoming, describe, encode
from flexp.links.grpc import connect, serve
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PullReply,
    PullRequest,
    Welcome,
    size,
)
from flexp.links.rules import Agreement, Limits, check_reply, check_request
from flexp.links.translate import read_error, read_welcome, to_frame, to_message, welcome_frame
from flexp.links.wire import CHUNK, DTYPES, Field, Head, Kind, head_bytes, parse
from tests.harness import equal, seeded, shared_weights, world

from .grpc_tools import SOON, send_raw

B, T, H = 2, 5, 32
CPU = torch.device("cpu")
AGREED = Agreement(torch.float32, H, 4, 64, 1 << 20)
JOIN = Join("a", "0" * 16, (1, 4), "torch.float32", "lora", AlignConfig(teach=True), LoraConfig(targets=["q"]), None)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(len(shape))).to(dtype)


def receive(messages: Sequence[bytes], agreement: Agreement | None = AGREED) -> Any:
    """What the server makes of a frame."""
    incoming = Incoming(messages[0])
    check_request(incoming.head, agreement, "a")
    incoming.allocate()
    for message in messages[1:]:
        incoming.add(message)
    if not incoming.done:
        raise LinkError("the stream ended in the middle of a frame")
    return to_message(incoming.frame(), CPU)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(value, right[key]) for key, value in left.items())
    return type(left) is type(right) and left == right


FORWARD = ForwardRequest(
    3, draw(B, T, H), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.arange(T)[None], draw(B, T, H),
    (draw(B, T, H), -draw(B, T, H)), True,
)  # fmt: skip


@pytest.mark.parametrize(
    "message",
    [
        JOIN,
        FORWARD,
        ForwardRequest(4, draw(1, 1, H), torch.ones(1, 1, dtype=torch.bool)),
        BackwardRequest(3, draw(B, T, H).mT.contiguous().mT, 2**40, 3, 1 / 3, 1e-300),
        PullRequest(1, 3),
        FetchRequest(2, 3, 2**40),
        Abort(),
        ExtendRequest(
            4,
            9,
            draw(B, T, H),
            torch.ones(B, T, dtype=torch.int64),
            torch.arange(T)[None],
            torch.ones(B, dtype=torch.int64),
        ),
        ExtendRequest(4, 0, draw(B, T, H)),
        EndGeneration(4),
    ],
    ids=lambda message: type(message).__name__,
)
def test_requests_come_out_as_they_went_in(message: Any) -> None:
    got = receive(encode(to_frame(message, 7)), None if isinstance(message, Join) else AGREED)
    assert type(got) is type(message)
    assert all(same(getattr(got, name), getattr(message, name)) for name in message.__dataclass_fields__)
    assert to_frame(message, 7).head.payload == size(message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_replies_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    z = draw(B, T, H, dtype=dtype)
    for request, reply in (
        (ForwardRequest(1, z), ForwardReply(z + 1, None)),
        (ForwardRequest(1, z), ForwardReply(z + 1, 0.1)),
        (ExtendRequest(1, 2, z), ExtendReply(z + 1)),
        (BackwardRequest(1, z), BackwardReply(z, (z, -z))),
        (PullRequest(1, 2), PullReply({"b.weight": draw(3, 4, dtype=dtype), "a.bias": draw(2), "scalar": draw(1)[0]})),
        (FetchRequest(2), FetchReply(2**40, 3, {"b.weight": draw(3, 4, dtype=dtype), "scalar": draw(1)[0]})),
        (FetchRequest(2), FetchReply(0, 0)),
    ):
        incoming = Incoming(encode(to_frame(reply, 9, 0.25))[0])
        check_reply(incoming.head, to_frame(request, 9).head, replace(AGREED, dtype=dtype))
        incoming.allocate()
        assert incoming.done
        got = to_message(incoming.frame(), CPU)
        assert all(same(getattr(got, name), getattr(reply, name)) for name in reply.__dataclass_fields__)
        assert incoming.head.seconds == 0.25


def test_the_welcome_says_the_limits() -> None:
    limits = Limits(max_tokens=99, frame_bytes=1000)
    frame = welcome_frame(Welcome(1, 4, H), limits, 1)
    welcome, agreement = read_welcome(parse(encode(frame)[0]).text, JOIN)
    assert welcome == Welcome(1, 4, H)
    assert agreement == Agreement(torch.float32, H, 4, 99, 1000)
    for text in ("", "[]", "{}", '{"welcome": {"base_depth": -1, "blocks": 4, "hidden": 1}, "limits": {}}'):
        with pytest.raises(LinkError, match="welcome cannot be read"):
            read_welcome(text, JOIN)
        assert "no readable reason" in str(read_error(text))


def test_a_frame_byte_by_byte() -> None:
    """The example of docs/protocol.md."""
    (message,) = encode(to_frame(ForwardRequest(5, torch.ones(1, 2, 1), torch.tensor([[1, 0]]), train=True), 2))
    tensors = struct.pack("<2f", 1.0, 1.0) + bytes([1, 0])
    head = (
        b"FLXP" + bytes([2, 3]) + struct.pack("<HQdII", 2, 2, 0.0, 0, zlib.crc32(tensors))
        + struct.pack("<qBq", 5, 1, 0) + bytes([10, 1, 3]) + b"hidden_BTH" + struct.pack("<3I", 1, 2, 1)
        + bytes([7, 0x85, 2]) + b"mask_BT" + struct.pack("<2I", 1, 2)
    )  # fmt: skip
    assert message == head + struct.pack("<I", zlib.crc32(head)) + tensors


def test_what_was_damaged_on_its_way_is_told_from_what_is_refused() -> None:
    whole = encode(
        to_frame(ForwardRequest(5, draw(2, 3, H), torch.ones(2, 3, dtype=torch.long), train=True, step=1), 2)
    )[0]
    size = parse(whole).size
    for place in (5, 9, 30, size - 6, size, len(whole) - 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        with pytest.raises(LinkLostError if place >= 9 else LinkError):
            receive([bytes(broken)])


@given(st.integers(1, 3 * CHUNK // 4), st.integers(1, 5000))
@settings(max_examples=15, deadline=None)
def test_chunks_have_the_agreed_size(first: int, second: int) -> None:
    tensors = {"a": torch.arange(first, dtype=torch.float32), "b": torch.arange(second, dtype=torch.bfloat16)}
    frame = to_frame(PullReply(tensors), 1)
    messages = encode(frame)
    assert [len(message) for message in messages[:-1]] == [CHUNK] * (len(messages) - 1)
    assert 0 < len(messages[-1]) <= CHUNK
    incoming = Incoming(messages[0])
    incoming.allocate()
    for message in messages[1:]:
        incoming.add(message)
    assert incoming.done
    assert all(same(value, tensors[name]) for name, value in incoming.frame().named())


WHOLE = encode(to_frame(FORWARD, 7))[0]
LONG = encode(to_frame(ForwardRequest(1, draw(80, 200, H)), 7))
WIDE = replace(AGREED, max_tokens=1 << 20, frame_bytes=1 << 30)


@given(st.integers(0, len(WHOLE) - 1))
def test_truncated_frames_are_refused(length: int) -> None:
    with pytest.raises(LinkError):
        receive([WHOLE[:length]])


@given(st.integers(0, len(LONG) - 1), st.sampled_from(["drop", "shorten", "lengthen", "end"]))
@settings(max_examples=30, deadline=None)
def test_long_frames_that_are_not_whole_are_refused(index: int, harm: str) -> None:
    assert len(LONG) == 2
    messages = list(LONG)
    if harm == "drop":
        del messages[index]
    elif harm == "end":
        messages = messages[:1]
    else:
        messages[index] = messages[index][:-1] if harm == "shorten" else messages[index] + b"\0"
    with pytest.raises(LinkError):
        receive(messages or [b""], WIDE)
    assert receive(LONG, WIDE).exchange == 1


@given(st.binary(min_size=1, max_size=100))
def test_oversized_frames_are_refused(more: bytes) -> None:
    with pytest.raises(LinkError, match="bytes where the frame has"):
        receive([WHOLE + more])


@given(st.integers(0, 255).filter(lambda kind: kind not in Kind._value2member_map_))
def test_unknown_kinds_are_refused(kind: int) -> None:
    with pytest.raises(LinkError, match="unknown kind"):
        receive([WHOLE[:5] + bytes([kind]) + WHOLE[6:]])


@given(st.sampled_from(sorted(set(Kind) - {Kind.FORWARD, Kind.BACKWARD, Kind.EXTEND})))
def test_other_kinds_have_no_tensors_and_come_from_the_right_side(kind: Kind) -> None:
    fields = (describe("hidden_BTH", draw(B, T, H)),)
    known = {Kind.FORWARD_REPLY: (0, 0.0), Kind.PULL: (1, 2, 0), Kind.END_GENERATION: (1,)}
    numbers = {**known, Kind.FETCH: (1, 0, 9), Kind.FETCH_REPLY: (0, 1)}.get(kind, ())
    head = Head(kind, 1, 0.0, numbers, "", fields)
    with pytest.raises(LinkError, match=r"expected none|does not come from a client"):
        receive([head_bytes(head) + bytes(head.payload)])


SHAPES = st.lists(st.integers(1, 2**32 - 1) | st.sampled_from([B, T, H, 1]), max_size=8).map(tuple)
HIDDEN = Field("hidden_BTH", torch.float32, (B, T, H))
FIELDS = st.builds(
    Field,
    st.sampled_from(["hidden_BTH", "mask_BT", "positions_BT", "base_BTH", "inner_BTH", "labels", "input_ids", ""]),
    st.sampled_from(list(DTYPES.values())),
    SHAPES,
    st.booleans(),
)


def agreed(fields: tuple[Field, ...]) -> bool:
    """The rule of docs/protocol.md once more, in other words."""
    by_name: dict[str, list[Field]] = {}
    for item in fields:
        by_name.setdefault(item.name, []).append(item)
    if len(by_name.get("hidden_BTH", [])) != 1:
        return False
    shape = by_name["hidden_BTH"][0].shape
    if len(shape) != 3 or shape[2] != H or shape[0] * shape[1] > 64:
        return False
    for name, items in by_name.items():
        if len(items) > 1 and name != "inner_BTH":
            return False
        for item in items:
            allowed = {
                "mask_BT": item.packed and item.shape == shape[:2],
                "positions_BT": not item.packed and item.dtype == torch.int64
                and item.shape in (shape[:2], (1, shape[1])),
            }.get(name, not item.packed and item.dtype == torch.float32 and item.shape == shape)  # fmt: skip
            if not allowed or name not in ("hidden_BTH", "mask_BT", "positions_BT", "base_BTH", "inner_BTH"):
                return False
    return True


@given(st.lists(FIELDS | st.just(HIDDEN), max_size=4).map(tuple))
def test_shapes_and_types_that_were_not_agreed_are_refused_before_memory_is_taken(fields: tuple[Field, ...]) -> None:
    head = Head(Kind.FORWARD, 1, 0.0, (1, 1, 0), "", fields)
    if agreed(fields):
        check_request(head, AGREED, "a")
        return
    with pytest.raises(LinkError):
        check_request(head, AGREED, "a")


def test_a_huge_shape_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames.torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    head = Head(Kind.FORWARD, 1, 0.0, (1, 1, 0), "", (Field("hidden_BTH", torch.float32, (2**31, 2**31, H)),))
    with pytest.raises(LinkError, match="tokens, the server takes at most 64"):
        receive([(head_bytes(head) + bytes(CHUNK))[:CHUNK]])


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"FLXP\x01" + rest))
@settings(max_examples=300)
def test_noise_is_refused(noise: bytes) -> None:
    for agreement in (AGREED, None):
        try:
            got = receive([noise], agreement)
        except LinkError:
            continue
        assert isinstance(got, Abort | PullRequest)  # what has no content can be met by chance


@given(st.data())
@settings(max_examples=300)
def test_flipped_bytes_never_do_anything_but_a_refusal_or_a_message(data: st.DataObject) -> None:
    broken = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    try:
        got = receive([bytes(broken)])
    except LinkError:
        return
    assert isinstance(got, ForwardRequest)
    assert got.hidden_BTH.shape == (B, T, H)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "[" * 10_000, '{"client": "a"}', '{"client": NaN}',
     JOIN.client.join(['{"', '"}'])],
)  # fmt: skip
def test_odd_joining_texts_are_refused(text: str) -> None:
    with pytest.raises(LinkError, match="joining message cannot be read"):
        receive([head_bytes(Head(Kind.JOIN, 1, text=text))], None)


def test_joining_texts_have_no_further_keys() -> None:
    text = to_frame(JOIN, 1).head.text
    for old, new in (('"client"', '"code":1,"client"'), ('"teach"', '"run"'), ('"kl"', '"exec"'), ("[1,4]", "[1,4,5]")):
        assert old in text
        with pytest.raises(LinkError, match="joining message cannot be read"):
            receive([head_bytes(Head(Kind.JOIN, 1, text=text.replace(old, new)))], None)


BAD_FRAMES = st.one_of(
    st.integers(0, len(WHOLE) - 1).map(lambda length: [WHOLE[:length]]),
    st.binary(min_size=1, max_size=50).map(lambda more: [WHOLE + more]),
    st.sampled_from([0, 99, 255, Kind.WELCOME, Kind.ERROR]).map(
        lambda kind: [WHOLE[:5] + bytes([kind]) + WHOLE[6:]]
    ),
    st.sampled_from(list(DTYPES.values())[1:]).map(
        lambda dtype: encode(to_frame(BackwardRequest(1, draw(B, T, H).to(dtype)), 9))
    ),
    st.sampled_from([(B, T, H + 1), (B, T), (1, T, H, 1), (3000, 30, H)]).map(
        lambda shape: encode(Frame(
            Head(Kind.BACKWARD, 9, 0.0, (1, 1, 1, 1.0, 1.0), "", (Field("grad_BTH", torch.float32, shape),)),
            (torch.ones(shape),),
        ))
    ),
)  # fmt: skip


def test_bad_frames_on_a_live_stream_leave_the_weights_alone() -> None:
    here = world("llama")
    before = shared_weights(here.server)
    ended = []
    with serve(here.server, limits=Limits(max_tokens=64)) as serving:
        url = f"grpc://{serving.address}"
        other = connect(url, "b", codec="off")
        honest = here.client("b", (3, 4), link=other)

        @given(BAD_FRAMES)
        @settings(max_examples=40, deadline=None)
        def try_one(messages: list[bytes]) -> None:
            while "a" in serving.clients:
                pass
            link = connect(url, "a", codec="off")
            model = here.client("a", (2, 4), link=link)
            send_raw(link, lambda number: encode(to_frame(Abort(), number))).result(SOON)  # what is right is taken
            model(**here.batch())  # exchange 1 waits for its backward
            ended.append(send_raw(link, lambda _: messages).exception(SOON))
            assert isinstance(ended[-1], LinkError)
            link.close()

        try_one()
        assert len(ended) >= 40
        assert equal(shared_weights(here.server), before)
        honest(**here.batch()).loss.backward()
        assert here.server.shared.version == 1
        other.close()
