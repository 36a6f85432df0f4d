"""What codecs do to numbers, what they cross as, and that every link does the same with them."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexp.config import AlignConfig, CodecConfig, CodecName, OptimizerConfig, ServerConfig
from flexp.errors import LinkError
from flexp.links.base import Link
from flexp.links.codecs import GROUP, codec_of
from flexp.links.coding import Coding
from flexp.links.frames import Field, Head, Incoming, encode
from flexp.links.grpc import connect, serve
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest
from flexp.links.opening import connected
from flexp.links.rules import Agreement, check_reply, check_request
from flexp.optim import Updater
from flexp.registry import CODECS
from tests.harness import copied, equal, seeded, shared_weights, world

NAMES = list(CODECS)
CPU = torch.device("cpu")
# Bytes of an entry, and of the scales, as docs/protocol.md has them; H = 384.
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8-row": 1, "int8-channel": 1, "fp8": 1, "int4": 0.5}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=seeded(seed))


def round_trip(name: str, value: Tensor) -> Tensor:
    codec = CODECS[name]()
    parts = codec.encode(value)
    assert [(part.dtype, tuple(part.shape)) for part in parts] == list(codec.layout(tuple(value.shape)))
    return codec.decode(parts, value.shape[-1], value.dtype)


def bound(name: str, value: Tensor) -> Tensor:
    """The largest error of each entry that the table in codecs.py promises."""
    magnitude = value.abs()
    if name == "fp32":
        return torch.zeros_like(value)
    if name == "bf16":
        return magnitude * 2.0**-8
    if name == "fp16":
        return torch.maximum(magnitude * 2.0**-11, torch.tensor(2.0**-25))
    if name == "int8-channel":
        return magnitude.amax((0, 1)).expand_as(value) / 254
    row = magnitude.amax(-1, keepdim=True).expand_as(value)
    if name == "int8-row":
        return row / 254
    if name == "fp8":
        return torch.maximum(magnitude * 2.0**-4, row * 2.0**-18)
    groups = [group.abs().amax(-1, keepdim=True).expand_as(group) for group in value.split(GROUP, -1)]
    return torch.cat(groups, -1) / 13.9


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 70))


@given(st.sampled_from(NAMES), SIZES, st.integers(0, 1000), st.floats(-4, 4))
@settings(max_examples=150, deadline=None)
def test_no_entry_is_further_off_than_promised(name: str, size: tuple[int, ...], seed: int, power: float) -> None:
    value = draw(*size, seed=seed, scale=10**power) ** 3  # heavy tails, as activations have them
    value = value.clamp(-65_000, 65_000)
    got = round_trip(name, value)
    assert got.dtype == value.dtype
    assert bool(((got - value).abs() <= bound(name, value) * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_what_is_too_small_for_a_scale_stay_harmless(name: str) -> None:
    assert torch.equal(round_trip(name, torch.zeros(2, 3, 33)), torch.zeros(2, 3, 33))
    tiny = torch.full((1, 2, 33), 1e-44)
    assert bool((round_trip(name, tiny) - tiny).abs().max() <= 2e-44)
    value = draw(2, 3, 33)
    value[1] = 0.0  # padding
    assert torch.equal(round_trip(name, value)[1], value[1])


@given(st.sampled_from(NAMES), SIZES, st.sampled_from([math.inf, -math.inf, math.nan]), st.data())
@settings(max_examples=100, deadline=None)
def test_what_is_not_finite_is_not_hidden(name: str, size: tuple[int, ...], odd: float, data: st.DataObject) -> None:
    value = draw(*size)
    place = tuple(data.draw(st.integers(0, length - 1)) for length in size)
    value[place] = odd
    got = round_trip(name, value)
    assert not math.isfinite(got[place])
    other = round_trip(name, draw(*size))
    if name not in ("int8-channel", "int4") and size[0] > 1:
        rest = [index for index in range(size[0]) if index != place[0]]
        assert torch.equal(got[rest], other[rest])  # other examples are not touched


def test_float16_keeps_finite_what_is_finite() -> None:
    value = torch.tensor([[[1e6, -1e9, 3.0]]])
    assert round_trip("fp16", value).tolist() == [[[65504.0, -65504.0, 3.0]]]
    assert round_trip("fp16", torch.tensor([[[math.inf, math.nan]]]))[0, 0, 0] == math.inf


def test_nibbles_stand_where_the_protocol_says() -> None:
    """The example of docs/protocol.md."""
    payload, scales = CODECS["int4"]().encode(torch.tensor([[[7.0, -7.0, 3.0]]]))
    assert payload.tolist() == [[[0x1F, 0x8B]]]
    assert (scales.dtype, scales.tolist()) == (torch.bfloat16, [[[1.0]]])


def test_half_precision_models_get_half_precision_back() -> None:
    value = draw(2, 3, 40).bfloat16()
    for name in NAMES:
        assert round_trip(name, value).dtype == torch.bfloat16
    assert torch.equal(round_trip("bf16", value), value)
    assert codec_of("off", torch.bfloat16).encode(value)[0] is value


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_that_cross(name: str) -> None:
    coding = Coding(CodecConfig.all(name), torch.float32, 384)  # type: ignore[arg-type]
    z, mask = draw(2, 5, 384), torch.ones(2, 5, dtype=torch.long)
    scales = {"int8-row": 4 * 10, "fp8": 4 * 10, "int8-channel": 4 * 384, "int4": 2 * 12 * 10}.get(name, 0)
    one = BYTES[name] * z.numel() + scales
    for message, count, rest in (
        (ForwardRequest(1, z, mask, base_BTH=z, inner_BTH=(z, z)), 4, 10),
        (ForwardReply(z), 1, 0),
        (BackwardRequest(1, z), 1, 0),
        (BackwardReply(z, (z, z)), 3, 0),
    ):
        assert coding.size(message) == coding.frame(message, 1).head.payload == count * one + rest


MIXED = CodecConfig(
    activation="int8-channel", gradient="fp8", aligned="int4", activation_down="bf16", gradient_down="int8-row"
)
H = 33
AGREED = Agreement(torch.float32, H, 4, 64, 1 << 20, MIXED)


def test_each_direction_and_kind_has_its_own() -> None:
    ours, theirs = (Coding(MIXED, torch.float32, H) for _ in range(2))
    z = draw(2, 5, H)
    for message, names in (
        (ForwardRequest(1, z, base_BTH=2 * z, inner_BTH=(3 * z, 4 * z)), ["int8-channel", "int4", "int4", "int4"]),
        (ForwardReply(z, 0.5), ["bf16"]),
        (BackwardRequest(1, z), ["fp8"]),
        (BackwardReply(z, (2 * z, 3 * z)), ["int8-row"] * 3),
    ):
        frame = ours.frame(message, 7)
        if isinstance(message, ForwardRequest | BackwardRequest):
            asked = frame.head
            check_request(asked, AGREED, "a")
        else:
            check_reply(frame.head, asked, AGREED)
        (octets,) = encode(frame)
        incoming = Incoming(octets)
        incoming.allocate()
        got = theirs.message(incoming.frame(), CPU)
        sent, found = values(message), values(got)
        for name, before, after in zip(names, sent, found, strict=True):
            assert torch.equal(after, round_trip(name, before))


def values(message: Any) -> list[Tensor]:
    names = ("hidden_BTH", "grad_BTH", "base_BTH")
    single = [getattr(message, name) for name in names if getattr(message, name, None) is not None]
    return [*single, *getattr(message, "inner_BTH", ())]


def test_other_types_shapes_or_scales_than_agreed_are_refused_by_the_head() -> None:
    head = Coding(MIXED, torch.float32, H).frame(ForwardRequest(1, draw(2, 5, H), base_BTH=draw(2, 5, H)), 7)
    fields = list(head.head.fields)
    assert [item.name for item in fields] == ["hidden_BTH", "hidden_BTH.scale", "base_BTH", "base_BTH.scale"]
    stranger = Field("hidden_BTH.scale", torch.float32, (2, 5, H))
    for wrong in (
        fields[:-1],
        [fields[0], *fields[2:]],
        [*fields, fields[1]],
        [*fields, fields[3]],
        [replace(fields[0], dtype=torch.float32), *fields[1:]],
        [fields[0], replace(fields[1], shape=(H + 1,)), *fields[2:]],
        [fields[0], replace(fields[1], shape=(10,)), *fields[2:]],
        [*fields[:2], replace(fields[2], shape=(2, 5, H)), fields[3]],
        [*fields[:3], replace(fields[3], dtype=torch.float32)],
        [*fields[:3], replace(fields[3], dtype=torch.uint8)],
    ):
        with pytest.raises(LinkError):
            check_request(Head("ForwardRequest", 1, fields=tuple(wrong)), AGREED, "a")
    exact = replace(AGREED, codec=CodecConfig())
    plain = [Field("hidden_BTH", torch.float32, (2, 5, H)), stranger]
    with pytest.raises(LinkError):
        check_request(Head("ForwardRequest", 1, fields=tuple(plain)), exact, "a")
    for wrong in (
        [],
        [Field("hidden_BTH", torch.float32, (2, 5, H))],
        [Field("hidden_BTH", torch.bfloat16, (2, 6, H))],
    ):
        with pytest.raises(LinkError, match="the server: "):
            check_reply(Head("ForwardReply", 7, fields=tuple(wrong)), head.head, AGREED)


@pytest.mark.parametrize("name", ["int4", "int8-row", "bf16"])
def test_error_feedback_owes_no_more_than_one_tensor(name: CodecName) -> None:
    """The sum of what arrived stays within one tensor's rounding of the sum that was meant; without, it drifts."""
    drift = {}
    for feedback in (True, False):
        sender = Coding(CodecConfig.all(name, error_feedback=feedback), torch.float32, 64)
        receiver = Coding(sender.config, torch.float32, 64)
        meant, arrived, worst = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64), 0.0
        for number in range(60):
            grad = draw(2, 3 + number % 3, 64, seed=number) + 0.013  # other lengths each time
            grad[1, -1] = 0.0
            got = receiver.message(sender.frame(BackwardRequest(1, grad), 1), CPU).grad_BTH
            assert torch.equal(got[1, -1], grad[1, -1])  # what has no gradient gets none
            meant += grad.double().sum((0, 1))
            arrived += got.double().sum((0, 1))
            worst = max(worst, float((round_trip(name, grad) - grad).double().sum((0, 1)).abs().max()))
        drift[feedback] = float((meant - arrived).abs().max()) / worst
    assert drift[True] < 1.5
    assert drift[False] > 2 * drift[True]


def test_error_feedback_survives_what_is_not_finite_and_leaves_activations_alone() -> None:
    coding = Coding(CodecConfig.all("int4", error_feedback=True), torch.float32, 64)
    coding.frame(ForwardRequest(1, draw(1, 2, 64)), 1)
    assert not coding.residuals
    coding.frame(BackwardRequest(1, draw(1, 2, 64)), 1)
    assert list(coding.residuals) == ["gradient.1"]
    frame = coding.frame(BackwardRequest(1, draw(1, 2, 64) / 0), 1)
    assert not bool(coding.message(frame, CPU).grad_BTH.isfinite().any())
    assert not coding.residuals
    coding.frame(BackwardReply(draw(1, 2, 64), (draw(1, 2, 64, seed=1),)), 1)
    assert list(coding.residuals) == ["gradient_down.1", "gradient_down.2"]


SGD = OptimizerConfig(name="sgd", lr=1e-2, clip=None)
EVERY = AlignConfig(kind="mse", at="every-block")
EVERYTHING = [CodecConfig.all(name, error_feedback=name == "int4") for name in NAMES] + [MIXED, CodecConfig()]


def trained(link: Link, here: Any, codec: CodecConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Client's and server's weights after three steps."""
    model = here.client("a", (3, 4), EVERY, link=link, codec=codec)
    updater = Updater(model.stage.trainable(), SGD)
    for seed in range(3):
        model(**here.batch(seed, padding="left", length=6 + seed)).loss.backward()
        updater.step()
    return copied(model.stage.trainable()), shared_weights(here.server)


@pytest.mark.parametrize("codec", EVERYTHING, ids=lambda codec: f"{codec.activation}-{codec.gradient}")
def test_in_process_and_grpc_are_one_bit_for_bit(codec: CodecConfig) -> None:
    results, links = [], []
    for remote in (False, True):
        here = world("llama", optimizer=SGD)
        with ExitStack() as stack:
            if remote:
                serving = stack.enter_context(serve(here.server))
                links.append(stack.enter_context(connected(connect(f"grpc://{serving.address}", "a"))))
            else:
                links.append(here.server.connect("a"))
            results.append((*trained(links[-1], here, codec), here.server.residuals("a"), links[-1].residuals))
            links[-1].meter.training.server_seconds = links[-1].meter.training.waited_seconds = 0.0
    for near, far in zip(*results, strict=True):
        assert equal(near, far)
    assert links[0].meter == links[1].meter
    assert bool(results[0][2]) == codec.error_feedback


def test_a_network_link_has_bf16_and_the_link_inside_a_process_rounds_nothing() -> None:
    here = world("llama")
    with serve(here.server) as serving:
        url = f"grpc://{serving.address}"
        for link, expected in (
            (here.server.connect("a"), CodecConfig()),
            (connect(url, "b"), CodecConfig.all("bf16")),
            (connect(url, "c", codec="off"), CodecConfig()),
            (connect(url, "d", codec=MIXED), MIXED),
        ):
            here.client(link.client, (2, 4), link=link)
            assert (here.server._sessions[link.client].join.codec or CodecConfig()) == expected
            link.close()


def test_a_server_may_allow_some_codecs_only() -> None:
    here = world("llama", config=ServerConfig(codecs=["off", "bf16"]))
    here.client("a", (2, 4), codec=CodecConfig.all("bf16"))
    with pytest.raises(
        LinkError, match=r"it asks for the codec int4, the server has off, bf16; set another link.codec"
    ):
        here.client("b", (2, 4), codec=CodecConfig(activation="bf16", gradient_down="int4"))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_are_not_finite_are_refused_whatever_the_codec(name: CodecName) -> None:
    here = world("llama")
    model = here.client("a", (2, 4), codec=CodecConfig.all(name))
    before = shared_weights(here.server)
    loss = model(**here.batch()).loss
    with pytest.raises(LinkError, match="not finite"):
        (loss * math.nan).backward()
    assert equal(shared_weights(here.server), before)


def test_residuals_go_on_from_where_they_were() -> None:
    codec = CodecConfig.all("int4", error_feedback=True)
    here, there = (world("llama", optimizer=SGD) for _ in range(2))
    link = here.server.connect("a")
    trained(link, here, codec)
    state = {name: value.clone() for name, value in here.server.state().items()}
    assert any(name.startswith("residuals/a/gradient_down") for name in state)
    there.server.load(state)
    assert equal(there.server.residuals("a"), here.server.residuals("a"))
