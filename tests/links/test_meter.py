"""Bytes are counted where they cross, and are what one counts by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from flexp.config import AlignConfig
from flexp.links.asking import PullReply, PullRequest
from flexp.links.base import InProcessLink, Link, Meter
from flexp.links.declaring import size, tensors
from flexp.links.messages import Leave
from flexp.links.opening import connected
from tests.harness import RecordingLink, world

B, T, H = 3, 10, 32
FLOATS = 4 * B * T * H  # one activation in fp32


@pytest.mark.parametrize(
    ("cut", "align", "extra_up", "extra_down"),
    [
        ((2, 4), AlignConfig(kind="off"), 0, 0),
        ((1, 4), AlignConfig(kind="kl"), 0, 0),  # at the base depth there is nothing to align
        ((3, 4), AlignConfig(kind="kl", weight=0.0), 0, 0),
        ((2, 4), AlignConfig(kind="kl"), 1, 0),
        ((3, 4), AlignConfig(kind="cosine"), 1, 0),
        ((2, 4), AlignConfig(kind="mse", at="every-block"), 1, 0),
        ((3, 4), AlignConfig(kind="mse", at="every-block"), 2, 1),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_bytes_of_a_full_exchange(
    cut: tuple[int, int], align: AlignConfig, extra_up: int, extra_down: int, padded: bool
) -> None:
    here = world("llama")
    model = here.client("a", cut, align)
    batch = here.batch(padding="left" if padded else "none", batch=B, length=T)
    model(**batch).loss.backward()
    mask = B * T if padded else 0  # one byte an entry
    traffic = model.link.meter.training
    assert traffic.bytes_up == (1 + 1 + extra_up) * FLOATS + mask  # z, ∂task/∂h, and what alignment needs
    assert traffic.bytes_down == (1 + 1 + extra_down) * FLOATS  # h, ∂total/∂z
    assert traffic.exchanges == 2
    assert traffic.server_seconds > 0
    assert model.link.meter.evaluation.bytes_up == model.link.meter.evaluation.exchanges == 0


def test_half_precision_is_half_the_bytes() -> None:
    here = world("llama", dtype=torch.bfloat16)
    model = here.client("a", (2, 4))
    model(**here.batch(batch=B, length=T)).loss.backward()
    assert model.link.meter.training.bytes_up == model.link.meter.training.bytes_down == FLOATS


def test_evaluation_is_counted_apart() -> None:
    here = world("bert")
    model = here.client("a", (2, 4), AlignConfig(kind="kl"))
    batch = here.batch(padding="right", batch=B, length=T)
    with torch.no_grad():
        model.eval()(**batch)
        model.train()(**batch)  # without gradients nothing is trained, whatever the mode
    training, evaluation = model.link.meter.training, model.link.meter.evaluation
    assert training.bytes_up == training.bytes_down == training.exchanges == 0
    tokens, rows, flags = 4 * H * int(batch["attention_mask"].sum()), 4 * H * B, 2 * B * T  # one row a text is read
    assert evaluation.bytes_up == 2 * (tokens + flags)
    assert evaluation.bytes_down == 2 * rows
    assert evaluation.exchanges == 2
    model(**batch).loss.backward()
    assert evaluation.exchanges == 2
    assert training.bytes_up == 2 * tokens + rows + flags
    assert training.bytes_down == rows + tokens


def test_waiting_for_pulled_weights_is_waiting() -> None:
    here = world("llama")
    model = here.client("a", (3, 4), AlignConfig(kind="weights"))
    call = model.link.call

    def slow(request: Any) -> Any:
        time.sleep(0.05 * isinstance(request, PullRequest))
        return call(request)

    model.link.call = slow  # type: ignore[method-assign]
    model(**here.batch()).loss.backward()
    before = model.link.meter.training.waited_seconds
    model.after_step()
    assert model.link.meter.training.waited_seconds - before >= 0.05


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bytes_of_pulled_weights(tuning: str) -> None:
    here = world("llama", tuning=tuning)
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (3, 4), AlignConfig(kind="weights"), link=link)
    model(**here.batch(batch=B, length=T)).loss.backward()
    before = link.meter.training.bytes_down
    model.after_step()
    personal = model.stage.trainable()
    aligned = sum(4 * value.numel() for name, value in personal.items() if model.stage.block_of(name) in (1, 2))
    assert link.meter.training.bytes_down - before == aligned
    assert link.meter.training.bytes_up == 2 * FLOATS
    assert sum(size(reply) for reply in link.sent(PullReply)) == aligned


def test_clients_are_metered_apart_and_meters_go_on_from_their_state() -> None:
    here = world("llama")
    a, b = here.client("a", (2, 4)), here.client("b", (3, 4))
    a(**here.batch(batch=B, length=T)).loss.backward()
    assert b.link.meter.training.bytes_up == 0
    meter = Meter()
    meter.load(a.link.meter.state())
    assert meter == a.link.meter
    assert meter is not a.link.meter


def test_what_is_refused_comes_to_no_exchange() -> None:
    here = world("llama")
    model = here.client("a", (2, 4))
    here.server.answer("a", Leave())
    with pytest.raises(Exception, match="has not joined"):
        model(**here.batch())
    assert model.link.meter.training.exchanges == 0
    assert model.link.meter.training.bytes_down == 0


def test_every_tensor_of_a_message_is_counted() -> None:
    here = world("llama")
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (3, 4), AlignConfig(kind="kl", at="every-block"), link=link)
    model(**here.batch(padding="left")).loss.backward()
    with torch.no_grad():
        model.eval()(**here.batch())

    def total(direction: str) -> int:
        messages: list[Any] = [message for way, message in link.messages if way == direction]
        found = [(name, value) for message in messages for name, value in tensors(message)]
        return sum(value.numel() * (1 if name == "mask_BT" else value.element_size()) for name, value in found)

    meter = link.meter
    assert meter.training.bytes_up + meter.evaluation.bytes_up == total("up")
    assert meter.training.bytes_down + meter.evaluation.bytes_down == total("down")


def test_a_link_closes_at_the_end_of_its_block() -> None:
    here = world("llama")
    link = here.server.connect("a")
    assert isinstance(link, InProcessLink)
    assert isinstance(link, Link)
    with connected(link):
        model = here.client("a", (2, 4), link=link)
        model(**here.batch())
        assert here.server.shared._held
    assert not here.server._sessions
    assert not here.server.shared._held
