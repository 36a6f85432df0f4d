"""What clients with deep cuts teach the server's copies of their aligned blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexp.config import AlignConfig, OptimizerConfig, ServerConfig
from flexp.links.messages import ForwardReply, ForwardRequest
from flexp.server import alignment
from tests.harness import RecordingLink, World, copied, disturb, equal, gradients, shared_weights, world

SGD = OptimizerConfig(name="sgd", lr=1.0, clip=None)


def steps_of(before: dict[str, torch.Tensor], here: World) -> dict[str, torch.Tensor]:
    """How far plain SGD with a rate of 1 moved each shared weight: its gradient."""
    return {name: before[name] - value for name, value in shared_weights(here.server).items()}


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_equal_copies_learn_the_same(name: str, memory: Any) -> None:
    here = world(name, optimizer=SGD, config=ServerConfig(memory=memory), dtype=torch.float64)
    model = here.client("a", (3, 4), AlignConfig(kind="off", teach=True))
    before = shared_weights(here.server)
    model(**here.batch(padding="right")).loss.backward()
    moved, own = steps_of(before, here), gradients(model.stage.trainable())
    aligned = [key for key in before if here.server.shared.stage.block_of(key) in (1, 2)]
    assert len(aligned) == 2 * len([key for key in before if here.server.shared.stage.block_of(key) == 3])
    for key in aligned:
        scale = own[key].abs().max().item()
        torch.testing.assert_close(moved[key], own[key], rtol=0, atol=1e-12 + 1e-9 * scale)
    assert max(own[key].abs().max().item() for key in aligned) > 1e-4


def test_without_it_they_learn_nothing_and_the_rest_is_the_same() -> None:
    results = []
    for teach in (False, True):
        here = world("llama", optimizer=SGD)
        model = here.client("a", (3, 4), AlignConfig(kind="off", teach=teach))
        disturb(model.stage.trainable())
        before = shared_weights(here.server)
        model(**here.batch()).loss.backward()
        results.append((steps_of(before, here), gradients(model.stage.trainable()), here))
    (plain, own, here), (taught, same, _) = results
    block_of = here.server.shared.stage.block_of
    assert equal(own, same)  # what goes down to the client does not change
    for key, value in plain.items():
        if block_of(key) in (1, 2):
            assert not value.any()
            assert taught[key].any()
        else:
            assert torch.equal(value, taught[key])


def test_micro_batches_teach_what_the_batch_teaches() -> None:
    moved = []
    for pieces in (1, 3):
        here = world("llama", optimizer=SGD, dtype=torch.float64)
        model = here.client("a", (3, 4), AlignConfig(kind="off", teach=True), accumulation=pieces)
        before, batch = shared_weights(here.server), here.batch()
        for index in range(pieces):
            part = {key: value[index::pieces] for key, value in batch.items()}
            (model(**part).loss / pieces).backward()
        moved.append(steps_of(before, here))
    for key, value in moved[0].items():
        torch.testing.assert_close(moved[1][key], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("align", "expected"),
    [
        ({"kind": "kl", "every": 2}, [True, False, True]),
        ({"kind": "kl", "every": 2, "teach": True}, [True, False, True]),
        ({"kind": "weights", "every": 2}, [False, False, False]),
        ({"kind": "weights", "every": 2, "teach": True}, [True, True, True]),
        ({"kind": "off", "teach": True}, [True, True, True]),
        ({"kind": "kl", "weight": 0.0, "every": 2}, [False, False, False]),
        ({"kind": "kl", "weight": 0.0, "every": 2, "teach": True}, [True, True, True]),
    ],
)
def test_z_base_goes_up_when_it_is_needed_and_only_then(align: dict[str, Any], expected: list[bool]) -> None:
    here = world("gpt2", optimizer=SGD)
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (2, 4), AlignConfig.model_validate(align), link=link)
    for _ in expected:
        model(**here.batch()).loss.backward()
    assert [request.base_BTH is not None for request in link.sent(ForwardRequest)] == expected


@pytest.mark.parametrize(
    ("align", "inner"),
    [
        ({"kind": "off"}, 0),
        ({"kind": "weights"}, 0),
        ({"kind": "mse", "weight": 0.0}, 0),
        ({"kind": "mse", "weight": 0.5}, 1),
    ],
)
def test_inner_activations_go_up_for_a_term_alone(align: dict[str, Any], inner: int) -> None:
    """Teaching needs z_base and nothing else, and computes what it computes without them."""
    sent, moved = [], []
    for at in ("cut", "every-block"):
        here = world("llama", optimizer=SGD)
        link = RecordingLink(here.server.connect("a"))
        model = here.client("a", (3, 4), AlignConfig.model_validate({**align, "at": at, "teach": True}), link=link)
        before = shared_weights(here.server)
        model(**here.batch()).loss.backward()
        (request,), (reply,) = link.sent(ForwardRequest), link.sent(ForwardReply)
        assert (reply.align is not None) == (inner > 0)
        sent.append((request.base_BTH is not None, len(request.inner_BTH), link.meter.training.bytes_up))
        moved.append(steps_of(before, here))
    activation = request.hidden_BTH.numel() * 4
    assert [entry[:2] for entry in sent] == [(True, 0), (True, inner)]
    assert sent[1][2] - sent[0][2] == inner * activation
    assert equal(*moved)


def test_a_term_of_weight_zero_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teaching goes on as with alignment off, to the last bit."""
    calls: list[int] = []
    term = alignment.alignment
    monkeypatch.setattr(alignment, "alignment", lambda *arguments: calls.append(1) or term(*arguments))
    moved = []
    for align in ({"kind": "kl", "weight": 0.5}, {"kind": "kl", "weight": 0.0}, {"kind": "off"}):
        here = world("llama", optimizer=SGD)
        model = here.client("a", (3, 4), AlignConfig.model_validate({**align, "teach": True}))
        before = shared_weights(here.server)
        model(**here.batch()).loss.backward()
        moved.append((steps_of(before, here), gradients(model.stage.trainable())))
    assert len(calls) == 1
    assert equal(moved[1][0], moved[2][0])
    assert equal(moved[1][1], moved[2][1])


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["off", "kl"])
def test_frozen_shared_blocks_learn_nothing_and_disturb_nothing(kind: Any, memory: Any) -> None:
    found = []
    for teach in (False, True):
        here = world("llama", optimizer=SGD, tuning="frozen", config=ServerConfig(memory=memory))
        model = here.client("a", (3, 4), AlignConfig(kind=kind, teach=teach), tuning="full")
        disturb(model.stage.trainable())
        frozen = copied(dict(here.server.shared.stage.model.named_parameters()))
        model(**here.batch(padding="right")).loss.backward()
        assert equal(copied(dict(here.server.shared.stage.model.named_parameters())), frozen)
        found.append(gradients(model.stage.trainable()))
    assert equal(*found)
    assert max(value.abs().max().item() for value in found[1].values()) > 1e-4


def test_a_client_at_the_base_depth_has_nothing_to_teach() -> None:
    here = world("llama", optimizer=SGD)
    link = RecordingLink(here.server.connect("a"))
    model = here.client("a", (1, 4), AlignConfig(kind="off", teach=True), link=link)
    model(**here.batch()).loss.backward()
    assert [request.base_BTH for request in link.sent(ForwardRequest)] == [None]
