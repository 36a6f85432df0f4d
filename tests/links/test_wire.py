"""Bytes from a stranger: what is not exactly what was agreed on is refused, and nothing comes of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.config import AlignConfig, LoraConfig
from flexp.errors import FullError, LinkError, LinkLostError
from flexp.links import frames
from flexp.links.asking import (
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    PullReply,
    PullRequest,
)
from flexp.links.coding import PLAIN
from flexp.links.declaring import MESSAGES, Request, size
from flexp.links.frames import CHUNK, TYPES, Field, Frame, Head, Incoming, describe, encode, head_bytes, parse, signed
from flexp.links.grpc import connect, serve
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    Order,
    Ready,
    Refusal,
    Welcome,
)
from flexp.links.rules import Agreement, Limits, check_reply, check_request
from tests.harness import equal, seeded, shared_weights, world

from .grpc_tools import SOON, send_raw

B, T, H = 2, 5, 32
CPU = torch.device("cpu")
AGREED = Agreement(torch.float32, H, 4, 64, 1 << 20)
JOIN = Join(
    "a", "0" * 16, (1, 4), "torch.float32", "lora", AlignConfig(kind="kl", teach=True), LoraConfig(targets=["q"]), None
)


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
    return PLAIN.message(incoming.frame(), CPU)


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
        PullRequest(1, 3, 2, known={"a.weight": "0f" * 16}),
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
    got = receive(encode(PLAIN.frame(message, 7)), None if isinstance(message, Join) else AGREED)
    assert type(got) is type(message)
    assert all(same(getattr(got, name), getattr(message, name)) for name in message.__dataclass_fields__)
    assert PLAIN.frame(message, 7).head.payload == size(message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_replies_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    z = draw(B, T, H, dtype=dtype)
    for request, reply in (
        (ForwardRequest(1, z), ForwardReply(z + 1, None)),
        (ForwardRequest(1, z), ForwardReply(z + 1, 0.1)),
        (ExtendRequest(1, 2, z), ExtendReply(z + 1)),
        (BackwardRequest(1, z), BackwardReply(z, (z, -z))),
        (PullRequest(1, 2), PullReply(3, ("c",), {"b.weight": draw(3, 4, dtype=dtype), "scalar": draw(1)[0]})),
        (FetchRequest(2), FetchReply(2**40, 3, ("a",), {"b.weight": draw(3, 4, dtype=dtype), "scalar": draw(1)[0]})),
        (FetchRequest(2), FetchReply(0, 0)),
    ):
        incoming = Incoming(encode(PLAIN.frame(reply, 9, 0.25))[0])
        check_reply(incoming.head, PLAIN.frame(request, 9).head, replace(AGREED, dtype=dtype))
        incoming.allocate()
        assert incoming.done
        got = PLAIN.message(incoming.frame(), CPU)
        assert all(same(getattr(got, name), getattr(reply, name)) for name in reply.__dataclass_fields__)
        assert incoming.head.seconds == 0.25


def test_the_welcome_says_the_limits() -> None:
    welcome = Limits(max_tokens=99, frame_bytes=1000).told(Welcome(1, 4, H))
    incoming = Incoming(encode(PLAIN.frame(welcome, 1))[0])
    incoming.allocate()
    assert PLAIN.message(incoming.frame(), CPU) == welcome
    assert Agreement.of(JOIN, welcome) == Agreement(torch.float32, H, 4, 99, 1000)
    for name, text in (("base_depth", "-1"), ("hidden", "1.5"), ("blocks", "null"), ("max_tokens", "[")):
        head = PLAIN.frame(welcome, 1).head
        odd = replace(head, scalars={**head.scalars, name: text})
        with pytest.raises(LinkError, match="Welcome cannot be read"):
            PLAIN.message(Frame(odd), CPU)


@pytest.mark.parametrize("text", ["null", "[]", "many", "1e99", str(2**63), "true", '"' + "9" * 400 + '"'])
def test_numbers_stay_within_their_bounds(text: str) -> None:
    for said, name in ((Ready(3), "steps"), (Order("step", "run"), "place"), (PullRequest(1, 2), "start")):
        head = PLAIN.frame(said, 1).head
        with pytest.raises(LinkError, match=f"{type(said).__name__} cannot be read: "):
            PLAIN.message(Frame(replace(head, scalars={**head.scalars, name: text})), CPU)


@pytest.mark.parametrize(
    "said",
    [
        Ready(3, None, "run", (1, 4), 2, {"loss": 0.5, "odd": float("inf")}),
        Order("step", "run", 7, count=3, save=4),
        Refusal("one line", again=True),
        Refusal.of(FullError("memory ran out")),
    ],
    ids=lambda said: type(said).__name__,
)
def test_words_cross_as_they_are(said: Any) -> None:
    incoming = Incoming(encode(PLAIN.frame(said, 1))[0])
    incoming.allocate()
    assert PLAIN.message(incoming.frame(), CPU) == said


def test_a_frame_byte_by_byte() -> None:
    """The example of docs/protocol.md; and what safetensors itself makes of the body."""
    request = ForwardRequest(5, torch.ones(1, 2, 1), torch.tensor([[1, 0]]), train=True)
    (message,) = encode(PLAIN.frame(request, 2))
    tensors = struct.pack("<2f", 1.0, 1.0) + bytes([1, 0])
    text = (
        b'{"__metadata__":{"message":"ForwardRequest","call":"2","seconds":"0.0","exchange":"5","train":"true",'
        b'"step":"0","mask_BT":"I64"},"hidden_BTH":{"dtype":"F32","shape":[1,2,1],"data_offsets":[0,8]},'
        b'"mask_BT":{"dtype":"U8","shape":[1,2],"data_offsets":[8,10]}}'
    )
    rest = struct.pack("<IQ", zlib.crc32(tensors), len(text)) + text
    assert message == b"FLXP\x09" + struct.pack("<I", zlib.crc32(rest)) + rest + tensors
    loaded = safetensors.torch.load(message[13:])
    assert torch.equal(loaded["hidden_BTH"], torch.ones(1, 2, 1))
    assert loaded["mask_BT"].tolist() == [[1, 0]]


def test_a_body_that_safetensors_wrote_is_read() -> None:
    """Its order of tensors is another one."""
    head = PLAIN.frame(FORWARD, 7).head
    tensors = {name: value.contiguous() for name, value in PLAIN.frame(FORWARD, 7).named().items()}
    metadata = {"message": head.message, "call": "7", "seconds": "0", **head.scalars}
    body = safetensors.torch.save(tensors, metadata)
    size = 8 + int.from_bytes(body[:8], "little")
    rest = struct.pack("<I", zlib.crc32(body[size:])) + body[:size]
    got = receive([b"FLXP\x09" + struct.pack("<I", zlib.crc32(rest)) + rest + body[size:]])
    assert all(same(getattr(got, name), getattr(FORWARD, name)) for name in FORWARD.__dataclass_fields__)


def test_what_was_damaged_on_its_way_is_told_from_what_is_refused() -> None:
    whole = encode(
        PLAIN.frame(ForwardRequest(5, draw(2, 3, H), torch.ones(2, 3, dtype=torch.long), train=True, step=1), 2)
    )[0]
    size = parse(whole).size
    for place in (4, 5, 9, 30, size - 6, size, len(whole) - 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        with pytest.raises(LinkLostError if place > 4 else LinkError):
            receive([bytes(broken)])


@given(st.integers(1, 3 * CHUNK // 4), st.integers(1, 5000))
@settings(max_examples=15, deadline=None)
def test_chunks_have_the_agreed_size(first: int, second: int) -> None:
    tensors = {"a": torch.arange(first, dtype=torch.float32), "b": torch.arange(second, dtype=torch.bfloat16)}
    frame = PLAIN.frame(PullReply(2, weights=tensors), 1)
    messages = encode(frame)
    assert [len(message) for message in messages[:-1]] == [CHUNK] * (len(messages) - 1)
    assert 0 < len(messages[-1]) <= CHUNK
    incoming = Incoming(messages[0])
    incoming.allocate()
    for message in messages[1:]:
        incoming.add(message)
    assert incoming.done
    assert all(same(value, tensors[name.removeprefix("weights.")]) for name, value in incoming.frame().named().items())


WHOLE = encode(PLAIN.frame(FORWARD, 7))[0]
LONG = encode(PLAIN.frame(ForwardRequest(1, draw(80, 200, H)), 7))
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


@given(st.text(max_size=40).filter(lambda name: name not in MESSAGES))
def test_unknown_messages_are_refused(name: str) -> None:
    with pytest.raises(LinkError, match="does not come from a client"):
        receive([head_bytes(Head(name, 1))])


OF_ACTIVATIONS = {"ForwardRequest", "KeptForwardRequest", "BackwardRequest", "ExtendRequest", "PassedBackward"}


@pytest.mark.parametrize("name", sorted(set(MESSAGES) - OF_ACTIVATIONS))
def test_other_messages_have_no_activations_and_come_from_the_right_side(name: str) -> None:
    head = Head(name, 1, fields=(describe("hidden_BTH", draw(B, T, H)),))
    words = "expected (none|values_N)" if issubclass(MESSAGES[name], Request) else "does not come from a client"
    with pytest.raises(LinkError, match=words):
        receive([head_bytes(head) + bytes(head.payload)])


SHAPES = st.lists(st.integers(1, 2**32 - 1) | st.sampled_from([B, T, H, 1]), max_size=8).map(tuple)
HIDDEN = Field("hidden_BTH", torch.float32, (B, T, H))
FIELDS = st.builds(
    Field,
    st.sampled_from(
        ["hidden_BTH", "mask_BT", "positions_BT", "base_BTH", "inner_BTH.0", "inner_BTH", "labels", "input_ids", ""]
    ),
    st.sampled_from(list(TYPES.values())),
    SHAPES,
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
        for item in items:
            allowed = {
                "mask_BT": item.dtype == torch.uint8 and item.shape == shape[:2],
                "positions_BT": item.dtype == torch.int64 and item.shape in (shape[:2], (1, shape[1])),
            }.get(name, item.dtype == torch.float32 and item.shape == shape)
            known = name in ("hidden_BTH", "mask_BT", "positions_BT", "base_BTH", "inner_BTH.0")
            if not allowed or not known or len(items) > 1:
                return False
    return True


@given(st.lists(FIELDS | st.just(HIDDEN), max_size=4).map(tuple))
def test_shapes_and_types_that_were_not_agreed_are_refused_before_memory_is_taken(fields: tuple[Field, ...]) -> None:
    head = Head("ForwardRequest", 1, fields=fields)
    if agreed(fields):
        check_request(head, AGREED, "a")
        return
    with pytest.raises(LinkError):
        check_request(head, AGREED, "a")


def test_a_huge_shape_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames.torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    head = Head("ForwardRequest", 1, fields=(Field("hidden_BTH", torch.float32, (2**31, 2**31, H)),))
    with pytest.raises(LinkError, match="tokens, the server takes at most 64"):
        receive([(head_bytes(head) + bytes(CHUNK))[:CHUNK]])


@given(st.binary(max_size=300) | st.binary(max_size=300).map(lambda rest: b"FLXP\x09" + rest))
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


@pytest.mark.parametrize("text", ["", "null", "[]", '{"run": 1}', "[" * 10_000, '{"kind": NaN}', "1", '"kl"'])
def test_odd_joining_texts_are_refused(text: str) -> None:
    head = PLAIN.frame(JOIN, 1).head
    for scalars in ({**head.scalars, "align": text}, {"client": head.scalars["client"]}, {**head.scalars, "code": "1"}):
        with pytest.raises(LinkError, match="Join cannot be read"):
            receive([head_bytes(replace(head, scalars=scalars))], None)


def test_joining_texts_have_no_further_keys() -> None:
    head = PLAIN.frame(JOIN, 1).head
    for name, old, new in (("align", '"teach"', '"run"'), ("align", '"kl"', '"exec"'), ("cut", "[1,4]", "[1,4,5]")):
        assert old in head.scalars[name]
        scalars = {**head.scalars, name: head.scalars[name].replace(old, new)}
        with pytest.raises(LinkError, match="Join cannot be read"):
            receive([head_bytes(replace(head, scalars=scalars))], None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F33"'), (b'"shape":[2,5,32]', b'"shape":[2,5,-2]'), (b'"shape":[2,5,32]', b'"shape":[2,5,0 ]'),
        (b'"data_offsets":[0,', b'"data_offsets":[4,'), (b'"__metadata__"', b'"__metadatA__"'),
        (b'"call":"7"', b'"call": 7 '),
        (b'"call":"7"', b'"call":"x"'), (b'"seconds":"0.0"', b'"seconds":"nan"'), (b'{"__m', b'["__m'),
        (b'"shape":[2,5,32]', b'"shape":"2,5,32"'),
    ],
)  # fmt: skip
def test_heads_that_are_no_safetensors_are_refused(old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    broken = signed(WHOLE.replace(old, new))
    assert broken != WHOLE
    with pytest.raises(LinkError):
        receive([broken])


BAD_FRAMES = st.one_of(
    st.integers(0, len(WHOLE) - 1).map(lambda length: [WHOLE[:length]]),
    st.binary(min_size=1, max_size=50).map(lambda more: [WHOLE + more]),
    st.sampled_from(["", "Forward", "Welcome", "Refusal"]).map(
        lambda name: encode(Frame(replace(PLAIN.frame(FORWARD, 9).head, message=name), PLAIN.frame(FORWARD, 9).tensors))
    ),
    st.sampled_from(list(TYPES.values())[1:]).map(
        lambda dtype: encode(PLAIN.frame(BackwardRequest(1, draw(B, T, H).to(dtype)), 9))
    ),
    st.sampled_from([(B, T, H + 1), (B, T), (1, T, H, 1), (3000, 30, H)]).map(
        lambda shape: encode(Frame(
            replace(PLAIN.frame(BackwardRequest(1, draw(B, T, H)), 9).head,
                    fields=(Field("grad_BTH", torch.float32, shape),)),
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
            send_raw(link, lambda number: encode(PLAIN.frame(Abort(), number))).result(SOON)  # what is right is taken
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
