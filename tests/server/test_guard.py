"""What a client's numbers may do to the shared blocks, and what becomes of a client whose numbers keep being bad."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexp.config import AlignConfig, GuardConfig, ServerConfig
from flexp.errors import BadValuesError, LinkError
from flexp.links.asking import FetchRequest, PullRequest
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest
from flexp.optim import norms, total
from flexp.server.checks import Bounds
from flexp.server.clients import Quarantine
from tests.harness import World, equal, seeded, shared_weights, world

HIDDEN = 32


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def joined(update: str = "every", **guard: Any) -> World:
    here = world(config=ServerConfig(update=update, mean_over=2, guard=GuardConfig(**guard)))  # type: ignore[arg-type]
    here.join("a", (1, 4))
    here.join("b", (1, 4))
    return here


def forward(here: World, client: str, number: int, **changes: Any) -> None:
    hidden_BTH = torch.randn(2, 5, HIDDEN, generator=seeded(number))
    here.server.answer(client, replace(ForwardRequest(number, hidden_BTH, train=True), **changes))


def backward(here: World, client: str, number: int, scale: float = 1.0, **changes: Any) -> None:
    grad_BTH = scale * torch.randn(2, 5, HIDDEN, generator=seeded(100 + number))
    here.server.answer(client, replace(BackwardRequest(number, grad_BTH), **changes))


def step(here: World, client: str, number: int, scale: float = 1.0, **changes: Any) -> None:
    forward(here, client, number)
    backward(here, client, number, scale, **changes)


def norm_of_a_step(scale: float = 1.0) -> float:
    here, seen = joined(), []
    here.server.shared.add = lambda gradients, *_, **__: seen.append(dict(gradients)) or True  # type: ignore[method-assign]
    step(here, "a", 1, scale)
    return float(torch.nn.utils.get_total_norm([seen[0][name] for name in sorted(seen[0])]))


def test_a_norm_beyond_the_bound_is_refused_and_one_below_is_not() -> None:
    norm = norm_of_a_step()
    here = joined(max_norm=norm * 1.01)
    before = shared_weights(here.server)
    with pytest.raises(BadValuesError, match=r"client a: the gradient of step 0 has the norm .* at most .*max_norm"):
        step(here, "a", 1, 1.02)
    assert equal(shared_weights(here.server), before)
    assert not here.server.shared._held
    step(here, "a", 1)
    assert here.server.shared.version == 1
    assert not equal(shared_weights(here.server), before)


def test_the_bound_is_on_the_whole_step_and_a_refused_one_is_void() -> None:
    here = joined(max_norm=1.5 * norm_of_a_step())
    for number in (1, 2):
        forward(here, "a", number, hidden_BTH=torch.ones(2, 5, HIDDEN))
    gradient = torch.randn(2, 5, HIDDEN, generator=seeded(101))
    here.server.answer("a", BackwardRequest(1, 1.2 * gradient, step=4, exchanges=2))
    with pytest.raises(BadValuesError, match="the gradient of step 4"):
        here.server.answer("a", BackwardRequest(2, 100 * gradient, step=4, exchanges=2))
    assert not here.server._sessions["a"].gathered
    assert here.server.shared.version == 0
    step(here, "a", 3)
    assert here.server.shared.version == 1


def test_clipping_scales_a_clients_step_to_the_bound() -> None:
    norm = norm_of_a_step()
    whole, clipped, small = joined(), joined(clip=norm / 4), joined(clip=norm * 2)
    taken: dict[str, dict[str, torch.Tensor]] = {}
    for name, here in (("whole", whole), ("clipped", clipped), ("small", small)):
        here.server.shared.add = (  # type: ignore[method-assign]
            lambda gradients, *_, name=name, **__: taken.update({name: dict(gradients)}) or True
        )
        step(here, "a", 1)
    assert equal(taken["small"], taken["whole"])
    for name, value in taken["whole"].items():
        assert torch.allclose(taken["clipped"][name], value / 4, rtol=1e-5)


def test_an_exploding_gradient_is_one_out_of_proportion_to_those_accepted() -> None:
    here = joined(explode=50.0, settle=4, median_over=8)
    norm = norm_of_a_step()
    limit = 50 * max(1.0, norm)
    for number in range(1, 4):
        step(here, "a", number)
        assert here.server.bounds.most is None
    step(here, "b", 1)
    assert here.server.bounds.most == pytest.approx(limit, rel=0.5)
    before = shared_weights(here.server)
    with pytest.raises(BadValuesError, match=r"server\.guard\.explode = 50 times the median of the last 4"):
        step(here, "b", 2, 1e4)
    assert equal(shared_weights(here.server), before)
    step(here, "b", 3, 2.0)
    step(here, "a", 9)
    assert here.server.shared.version == 6


def test_where_training_has_converged_an_ordinary_gradient_does_not_explode() -> None:
    bounds = Bounds(GuardConfig(explode=100.0, settle=2))
    for _ in range(10):
        bounds.judge("a", 1, 1e-9)
    assert bounds.most == 100.0
    bounds.judge("b", 1, 99.0)
    with pytest.raises(BadValuesError, match="has the norm 101"):
        bounds.judge("b", 2, 101.0)
    with pytest.raises(BadValuesError, match="is not finite"):
        Bounds(GuardConfig(explode=None)).judge("a", 1, total(norms([torch.tensor([3.0e38, 3.0e38])])))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["hidden_BTH", "base_BTH"])
def test_activations_that_are_not_finite_are_refused(bad: float, field: str) -> None:
    here = world()
    here.join("a", (2, 4), align=AlignConfig(kind="mse"))
    value = torch.zeros(2, 5, HIDDEN)
    value[1, 4, 31] = bad
    with pytest.raises(BadValuesError, match="client a: an activation of exchange 7 is not finite"):
        forward(here, "a", 7, **{field: value})
    assert not here.server._sessions["a"].pending
    assert not here.server.shared._held


def test_a_weight_beyond_the_tokens_would_outweigh_the_others() -> None:
    """With ``mean``, 1e300 would make the sum of everybody's gradients infinite, and the mean one client's alone."""
    here = joined("mean")
    forward(here, "a", 1)
    for weight in (10.5, 1e300):
        with pytest.raises(LinkError, match=r"0 < weight <= 10, its tokens"):
            backward(here, "a", 1, weight=weight)
    backward(here, "a", 1, weight=10.0)
    step(here, "b", 1)
    assert here.server.shared.version == 1


def test_a_numbering_that_no_state_could_hold_is_refused() -> None:
    here = joined()
    for numbering in (1 << 63, -1):
        with pytest.raises(LinkError, match=r"expected 0 to 2\*\*63 - 1"):
            here.join("a", (1, 4), numbering=numbering)
    here.join("a", (1, 4), numbering=(1 << 63) - 1)
    assert here.server.clients["a"].progress.state()[0] == (1 << 63) - 1


def strike(here: World, client: str, number: int) -> None:
    with pytest.raises(BadValuesError):
        forward(here, client, number, hidden_BTH=torch.full((2, 5, HIDDEN), math.nan))


def test_who_keeps_sending_bad_values_is_quarantined_and_the_operator_told() -> None:
    clock = Clock()
    here = joined(strikes=3, within=6, aside_seconds=60.0)
    said: list[str] = []
    heard: list[str] = []
    guard = here.server.guard
    guard._clock, guard.say = clock, said.append
    guard.listeners.append(lambda client, _: heard.append(client))
    forward(here, "a", 1)
    strike(here, "a", 90)
    strike(here, "a", 91)
    assert here.server.aside("a") is None
    strike(here, "a", 92)
    assert heard == ["a"]
    assert len(said) == 1
    assert "client a is quarantined for another 60 s" in said[0]
    assert "flexp readmit" in said[0]
    assert not here.server.shared._held  # what it had in flight is dropped
    assert here.server.counts()["bad_requests"] == 3
    assert here.server.counts()["clients_aside"] == 1
    for call in (
        lambda: here.join("a", (1, 4)),
        lambda: forward(here, "a", 2),
        lambda: backward(here, "a", 1),
        lambda: here.server.answer("a", PullRequest(1, 2)),
        lambda: here.server.answer("a", FetchRequest(1)),
    ):
        with pytest.raises(LinkError, match="client a is quarantined for another 60 s"):
            call()
    step(here, "b", 1)  # the others never notice
    clock.now += 59.0
    assert here.server.aside("a") is not None
    clock.now += 1.5
    here.join("a", (1, 4))
    step(here, "a", 3)
    assert here.server.shared.version == 2
    strike(here, "a", 93)
    strike(here, "a", 94)
    assert here.server.aside("a") is None  # it began with a clean record


def test_the_operator_lets_a_client_in_again() -> None:
    here = joined(strikes=1, aside_seconds=None)
    strike(here, "a", 1)
    assert "until the operator lets it in again" in str(here.server.aside("a"))
    assert not here.server.readmit("b")
    assert here.server.readmit("a")
    here.join("a", (1, 4))
    step(here, "a", 2)


def test_bad_values_now_and_then_are_forgiven() -> None:
    here = joined(strikes=3, within=6)
    for number in range(1, 20, 2):
        strike(here, "a", 100 + number)
        for evaluation in range(2):
            forward(here, "a", 200 + evaluation, train=False)
    assert here.server.aside("a") is None  # two among any six
    assert here.server.guard.bad("a") == 10
    assert here.server.guard.bad("b") == 0


def test_a_restart_changes_neither_bounds_nor_who_is_quarantined() -> None:
    clock = Clock()
    here, other = joined(strikes=1, settle=2), joined(strikes=1, settle=2)
    for each in (here, other):
        each.server.guard._clock = clock
    for number in (1, 2, 3):
        step(here, "a", number)
    strike(here, "b", 4)
    other.server.load(here.server.state())
    assert other.server.bounds.most == here.server.bounds.most is not None
    assert other.server.aside("b") == here.server.aside("b") is not None
    assert other.server.aside("a") is None
    fresh = joined()
    assert not [key for key in fresh.server.state() if key.startswith("guard/")]
    other.server.load(fresh.server.state())
    assert other.server.bounds.most is None
    assert other.server.aside("b") is None


def test_giving_up_is_free() -> None:
    guard = Quarantine(GuardConfig(strikes=1))
    with pytest.raises(LinkError, match="has not joined"), guard.request("a"):
        raise LinkError("client a has not joined")
    assert guard.aside("a") is None
    here = joined(strikes=1)
    here.server.answer("a", Abort())
    assert here.server.aside("a") is None
