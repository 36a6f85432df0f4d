"""Whatever the order in which requests come, each client's gradient belongs to the weights of its own forward.

The reference keeps a deep copy of the shared weights of every forward, runs plain autograd on it, and hands the
gradients, in the order of arrival, to torch's own optimiser. Everything must be equal bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexp.config import OptimizerConfig, ServerConfig
from flexp.links.messages import BackwardRequest, ForwardRequest, Leave
from flexp.models.anatomy import Part
from tests.harness import ADAMW, SGD, copied, equal, party, plain_optimizer, seeded, shared_weights, world

CUTS = {"a": (1, 4), "b": (2, 3), "c": (3, 4)}
HIDDEN = 32


class Reference:
    """One copy of the shared blocks, in plain torch; forwards are computed anew when their backward comes."""

    def __init__(self, whole: Any, tuning: str, optimizer: OptimizerConfig) -> None:
        self.stage = party(whole, Part.server(1, 4), tuning)
        self.weights = self.stage.trainable()
        self.optimizer = plain_optimizer(list(self.weights.values()), optimizer)
        self.snapshots: dict[tuple[str, int], tuple[ForwardRequest, dict[str, Tensor]]] = {}

    def forward(self, client: str, request: ForwardRequest) -> None:
        self.snapshots[client, request.exchange] = (request, copied(self.weights))

    def backward(self, client: str, request: BackwardRequest) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """h and the gradients at z and of the parameters, from the snapshot; then the optimiser's step."""
        forward, snapshot = self.snapshots.pop((client, request.exchange))
        now = copied(self.weights)
        self._put(snapshot)
        z_BTH = forward.hidden_BTH.clone().requires_grad_()
        plan = self.stage.plan_without_inputs(z_BTH, forward.mask_BT)
        self.stage.model.train()
        h_BTH = self.stage.run(z_BTH, plan, *CUTS[client])
        h_BTH.backward(request.grad_BTH)
        grads = {name: value.grad.clone() for name, value in self.weights.items() if value.grad is not None}
        self._put(now)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert z_BTH.grad is not None
        return h_BTH.detach(), z_BTH.grad, grads

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.weights.items():
                value.copy_(values[name])


def request(number: int, padded: bool) -> tuple[ForwardRequest, Tensor]:
    """A forward of its own shape and content, and the gradient that will come back for it."""
    generator = seeded(number)
    batch, length = 2 + number % 2, 5 + number % 3
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, -2:] = 0
    hidden_BTH, grad_BTH = torch.randn(2, batch, length, HIDDEN, generator=generator)
    return ForwardRequest(number, hidden_BTH, mask if padded else None, train=True), 1e-3 * grad_BTH


def orders(count: int) -> list[tuple[tuple[str, str], ...]]:
    """Every order of F and B of ``count`` clients, each F before its B."""
    clients = list(CUTS)[:count]
    events = [(kind, client) for client in clients for kind in "FB"]
    legal = (
        order
        for order in itertools.permutations(events)
        if all(order.index(("F", client)) < order.index(("B", client)) for client in clients)
    )
    return list(legal)


class Pair:
    """A server and its reference, side by side; schedules may follow each other on them."""

    def __init__(self, name: str, tuning: str, optimizer: OptimizerConfig, memory: str) -> None:
        config = ServerConfig(memory=memory)  # type: ignore[arg-type]
        self.here = world(name, tuning=tuning, optimizer=optimizer, config=config)
        self.reference = Reference(self.here.whole, tuning, optimizer)
        self.applied: list[dict[str, Tensor]] = []
        shared, add = self.here.server.shared, self.here.server.shared.add

        def spy(grads: Mapping[str, Tensor], weight: float, norm: float | None = None, **options: Any) -> bool:
            self.applied.append(copied(grads))
            return add(grads, weight, norm, **options)

        shared.add = spy  # type: ignore[method-assign]
        for client, cut in CUTS.items():
            self.here.join(client, cut)

    def play(self, schedule: Iterable[tuple[str, str, int]]) -> int:
        """Run (F or B, client, exchange) on both, comparing all along; gives the most that was in flight."""
        server, shared = self.here.server, self.here.server.shared
        outputs: dict[tuple[str, int], Tensor] = {}
        most = 0
        for kind, client, exchange in schedule:
            forward, grad_BTH = request(exchange, padded=exchange % 2 == 1)
            if kind == "F":
                self.reference.forward(client, forward)
                outputs[client, exchange] = server.answer(client, forward).hidden_BTH.clone()
            else:
                backward = BackwardRequest(exchange, grad_BTH)
                reply = server.answer(client, backward)
                h_BTH, grad_z_BTH, grads = self.reference.backward(client, backward)
                assert torch.equal(outputs.pop((client, exchange)), h_BTH)
                assert torch.equal(reply.grad_BTH, grad_z_BTH)
                assert equal(self.applied[-1], grads)
                assert {self.here.whole.block_of(key) for key in grads} == set(range(*CUTS[client]))
            most = max(most, len(outputs))
            assert len(shared.stashed) <= len(outputs)
            assert equal(shared_weights(server), copied(self.reference.weights))
        assert shared.version == len(self.applied)
        if not outputs:
            assert not shared.stashed
            assert not shared._held
        assert shared.peak_versions <= most + 1
        return most


def numbered(order: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    return [(kind, client, 1 + list(CUTS).index(client)) for kind, client in order]


MODELS = ["llama", "gpt2", "gpt2", "bert", "gpt2", "bert", "bert", "llama"]
RULES = list(itertools.product(("keep", "recompute"), (SGD, ADAMW), ("full", "lora")))


@pytest.mark.parametrize(
    ("name", "memory", "optimizer", "tuning"),
    # Every rule once; over them every model meets each half of every pair.
    [(name, *rule) for name, rule in zip(MODELS, RULES, strict=True)],
)
def test_two_requests_in_every_order(name: str, memory: Any, optimizer: Any, tuning: str) -> None:
    every = orders(2)
    assert len(every) == 6
    pair = Pair(name, tuning, optimizer, memory)
    for order in every:
        pair.play(numbered(order))


@pytest.mark.parametrize(
    ("name", "tuning", "optimizer", "memory", "half"),
    [
        ("gpt2", "lora", ADAMW, "keep", 1),
        ("llama", "full", SGD, "recompute", 0),
        pytest.param("llama", "full", ADAMW, "keep", 0, marks=pytest.mark.slow),
        pytest.param("gpt2", "lora", SGD, "recompute", 1, marks=pytest.mark.slow),
    ],
)
def test_three_requests_in_every_order(name: str, memory: Any, optimizer: Any, tuning: str, half: int) -> None:
    """Every order once; with those that `make soak` adds under keeping and recomputing, and under either optimiser."""
    every = orders(3)
    assert len(every) == 90
    pair = Pair(name, tuning, optimizer, memory)
    for order in every[half::2]:
        pair.play(numbered(order))


@st.composite
def schedules(draw: Any) -> list[tuple[str, str, int]]:
    """Up to 14 events; a client may have several exchanges in flight and finish them in any order."""
    flying: list[tuple[str, int]] = []
    events: list[tuple[str, str, int]] = []
    for number in range(1, draw(st.integers(4, 14)) + 1):
        if flying and (len(flying) == 5 or draw(st.booleans())):
            client, exchange = flying.pop(draw(st.integers(0, len(flying) - 1)))
            events.append(("B", client, exchange))
        else:
            client = draw(st.sampled_from(sorted(CUTS)))
            flying.append((client, number))
            events.append(("F", client, number))
    rest = draw(st.permutations(flying)) if draw(st.booleans()) else []
    return events + [("B", client, exchange) for client, exchange in rest]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(schedules(), st.sampled_from(["keep", "recompute"]), st.sampled_from(["full", "lora"]), st.booleans())
def test_long_schedules_with_several_exchanges_of_a_client(
    schedule: list[tuple[str, str, int]], memory: Any, tuning: str, adam: bool
) -> None:
    Pair("llama", tuning, ADAMW if adam else SGD, memory).play(schedule)


def test_nothing_is_copied_while_nothing_else_is_in_flight() -> None:
    serial = [(kind, "a", number) for number in (1, 2, 3) for kind in "FB"]
    pair = Pair("llama", "full", ADAMW, "keep")
    assert pair.play(serial) == 1
    assert pair.here.server.shared.peak_versions == 1


def test_leaving_frees_what_was_in_flight() -> None:
    here = world()
    for client, cut in CUTS.items():
        here.join(client, cut)
    for number, client in enumerate(CUTS, start=1):
        forward, grad_BTH = request(number, padded=False)
        here.server.answer(client, forward)
        if client == "b":
            here.server.answer(client, BackwardRequest(number, grad_BTH))
    shared = here.server.shared
    assert len(shared.stashed) == 1  # of the version that a's forward ran with
    here.server.answer("a", Leave())
    here.server.answer("c", Leave())
    assert not shared.stashed
    assert not shared._held


def test_joining_again_drops_what_was_in_flight_and_changes_the_cut() -> None:
    here = world()
    here.join("a", (1, 4))
    here.server.answer("a", request(1, padded=False)[0])
    here.join("a", (2, 3))
    assert not here.server.shared._held
    forward, grad_BTH = request(2, padded=False)
    before = shared_weights(here.server)
    here.server.answer("a", forward)
    here.server.answer("a", BackwardRequest(2, grad_BTH))
    after = shared_weights(here.server)
    changed = {here.whole.block_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {2}


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_dropout_of_a_client_does_not_depend_on_the_others(memory: Any) -> None:
    """Each client draws from a stream of its own, and recomputing draws what the forward drew."""

    def run(clients: list[str]) -> list[Tensor]:
        here = world("bert", dropout=0.3, config=ServerConfig(memory=memory), optimizer=ADAMW)
        here.server.shared.add = lambda *_, **__: False  # type: ignore[method-assign]  # weights stand still
        results = []
        for client in clients:
            here.join(client, (1, 4))
        for number in (1, 2):
            for client in clients:
                here.server.answer(client, request(number, padded=True)[0])
            for client in clients:
                reply = here.server.answer(client, BackwardRequest(number, request(number, padded=True)[1]))
                results += [reply.grad_BTH] if client == "a" else []
        return results

    alone, together = run(["a"]), run(["b", "a", "c"])
    assert all(torch.equal(left, right) for left, right in zip(alone, together, strict=True))
    other = run(["a"])
    assert all(torch.equal(left, right) for left, right in zip(alone, other, strict=True))


def test_keep_and_recompute_give_the_same_gradients_with_dropout() -> None:
    results = []
    for memory in ("keep", "recompute"):
        here = world("gpt2", dropout=0.2, config=ServerConfig(memory=memory))  # type: ignore[arg-type]
        here.join("a", (1, 4))
        here.join("b", (2, 4))
        grads = []
        for number in (1, 2, 3):
            here.server.answer("a", request(number, padded=True)[0])
            here.server.answer("b", request(number, padded=True)[0])
            for client in ("b", "a"):
                reply = here.server.answer(client, BackwardRequest(number, request(number, padded=True)[1]))
                grads.append(reply.grad_BTH)
        results.append((grads, shared_weights(here.server)))
    (kept, kept_weights), (again, again_weights) = results
    assert all(torch.equal(left, right) for left, right in zip(kept, again, strict=True))
    assert equal(kept_weights, again_weights)
