"""A client that sends what nobody agreed to: it is refused in one line, and nothing of it reaches anybody else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import AlignConfig, ServerConfig
from flexp.errors import BadValuesError, LinkError, LinkLostError
from flexp.links.asking import ExtendRequest, FetchRequest, PullRequest
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Join
from tests.harness import World, equal, shared_weights, world

NAN, INF = float("nan"), float("inf")
KL = AlignConfig(kind="kl")
Ask = Callable[[World], Any]


def z(*shape: int, fill: float = 0.1) -> Tensor:
    return torch.full(shape or (3, 10, 32), fill)


def places(first: int) -> Tensor:
    return torch.arange(10)[None] + first


def back(**changes: Any) -> Ask:
    """A backward to an honest forward."""

    def ask(here: World) -> Any:
        here.server.answer("a", ForwardRequest(7, z(), train=True))
        given = {"exchange": 7, "grad_BTH": z(), **changes}
        return here.server.answer("a", BackwardRequest(**given))

    return ask


def forward(**changes: Any) -> Ask:
    return lambda here: here.server.answer("a", ForwardRequest(**{"exchange": 7, "hidden_BTH": z(), **changes}))


def extend(**changes: Any) -> Ask:
    given = {"generation": 1, "past": 0, "hidden_BTH": z(), **changes}
    return lambda here: here.server.answer("a", ExtendRequest(**given))


def begun(**changes: Any) -> Ask:
    """Going on with an answer of three rows."""

    def ask(here: World) -> Any:
        extend()(here)
        return extend(past=10, **changes)(here)

    return ask


def join(**changes: Any) -> Ask:
    return lambda here: here.server.answer("a", Join(**(here.card("a", (3, 4)) | changes)))


ATTACKS: dict[str, tuple[Ask, str]] = {
    "activations that are no numbers": (forward(hidden_BTH=z(fill=NAN), train=True), "not finite"),
    "a z_base that is no number": (forward(base_BTH=z(fill=INF), train=True), "not finite"),
    "positions below nought": (forward(positions_BT=places(-3)), "go from -3 to 6, expected 0 to 63"),
    "positions behind the table": (forward(positions_BT=places(60)), "go from 60 to 69, expected 0 to 63"),
    "positions that no text has": (forward(positions_BT=places(2**62)), "expected 0 to 63"),
    "positions of another length": (forward(positions_BT=places(0)[:, :4]), "positions has shape"),
    "a mask of another shape": (forward(mask_BT=torch.ones(3, 4, dtype=torch.int64)), "mask has shape"),
    "another width": (forward(hidden_BTH=z(3, 10, 8)), "expected"),
    "another type": (forward(hidden_BTH=z().double()), "expected"),
    "activations for inner blocks": (forward(base_BTH=z(), inner_BTH=(z(), z())), "3 activations came for alignment"),
    "a z_base of another size": (forward(base_BTH=z(3, 9, 32)), "aligned activation"),
    "a gradient for nobody's forward": (back(exchange=99), "has no forward in flight"),
    "a gradient of another shape": (back(grad_BTH=z(1, 10, 32)), "the gradient is"),
    "a gradient that is no number": (back(grad_BTH=z(fill=NAN)), "not finite"),
    "an infinite gradient": (back(grad_BTH=z(fill=INF)), "not finite"),
    "a gradient that is too large": (back(grad_BTH=z(fill=1e38)), "not finite"),
    "the weight of a thousand": (back(weight=1000.0), "counts tokens"),
    "a weight that is no number": (back(weight=NAN), "counts tokens"),
    "no weight": (back(weight=-1.0), "counts tokens"),
    "more than all tokens": (back(tokens=2.0), "counts tokens"),
    "a step of no exchanges": (back(exchanges=0), "expected at least 1"),
    "the blocks that the server runs": (
        lambda here: here.server.answer("a", PullRequest(1, 4)), "expected some of its aligned"
    ),
    "the blocks below s_min": (lambda here: here.server.answer("a", PullRequest(-5, 2)), "expected some of its"),
    "blocks that are not given away": (lambda here: here.server.answer("a", FetchRequest(3)), "gives no shared"),
    "a block that there is not": (lambda here: here.server.answer("a", FetchRequest(-1)), "expected one of the shared"),
    "everything from tensor −1 on": (lambda here: here.server.answer("a", FetchRequest(1, -1)), "a tensor from 0 on"),
    "somebody else's name": (join(client="honest"), "names another client"),
    "another model": (join(fingerprint="0" * 16), "another one than the server's"),
    "blocks that the server has not": (join(cut=(0, 9)), "blocks that the server does not hold"),
    "a cut backwards": (join(cut=(4, 1)), "blocks that the server does not hold"),
    "a numbering that cannot be": (join(numbering=-1), "numbers its steps"),
    "an answer that nobody began": (extend(past=7), "the server holds 0"),
    "rows that are not there": (begun(rows_B=torch.tensor([0, 1, 99])), "do not exist"),
    "rows below nought": (begun(rows_B=torch.tensor([0, 1, -1])), "do not exist"),
    "more rows than before": (begun(hidden_BTH=z(5, 1, 32)), "has 5 rows now"),
    "places of an answer that no text has": (begun(positions_BT=places(-9)), "go from -9"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack(name: str) -> None:
    ask, said = ATTACKS[name]
    here = world("gpt2")
    here.join("a", (3, 4), align=KL)
    honest = here.client("honest", (2, 4))
    before = shared_weights(here.server)
    with pytest.raises(LinkError, match=said) as raised:
        ask(here)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert equal(before, shared_weights(here.server))
    here.server.answer("a", Abort())
    assert here.server.counts()["in_flight"] == 0
    honest(**here.batch()).loss.backward()
    assert here.server.shared.version == 1


def test_bad_values_count_against_a_client_whatever_they_are() -> None:
    here = world("gpt2")
    here.join("a", (3, 4))
    for number in range(5):
        with pytest.raises(BadValuesError):
            forward(positions_BT=places(60 + number))(here)
    assert "quarantined" in str(here.server.aside("a"))


def test_models_that_turn_positions_take_any_that_a_text_may_have() -> None:
    here = world("llama")
    here.join("a", (3, 4))
    forward(positions_BT=places(5000))(here)
    with pytest.raises(BadValuesError):
        forward(positions_BT=places(2**40))(here)


def many_forwards(config: ServerConfig, count: int = 6) -> tuple[World, list[Tensor]]:
    """Forwards without a backward of two clients, then all backwards; what came back."""
    here = world("llama", config=config, dropout=0.0)
    for name in "ab":
        here.join(name, (1, 4))
    for number in range(count):
        for name in "ab":
            here.server.answer(name, ForwardRequest(number, z(4, 16, 32, fill=0.1 * number), train=True))
    kept = [session.kept_bytes for session in here.server._sessions.values()]
    assert max(kept) <= config.max_kept_bytes // 2
    assert sum(kept) <= config.max_kept_bytes
    answers = [
        here.server.answer("ab"[number % 2], BackwardRequest(number // 2, z(4, 16, 32), step=1 + number // 2))
        for number in range(2 * count)
    ]
    return here, [answer.grad_BTH for answer in answers]


def test_forwards_that_have_no_room_are_run_again_and_come_to_the_same() -> None:
    roomy, expected = many_forwards(ServerConfig())
    graph = 4 * 16 * 32 * 4
    tight, found = many_forwards(ServerConfig(max_kept_bytes=40 * graph))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert equal(shared_weights(roomy.server), shared_weights(tight.server))


def test_what_is_kept_is_what_autograd_keeps() -> None:
    """Of a linear layer its input, by hand: 4 · 16 · 32 numbers of 4 bytes, once though three layers read them."""
    from torch import nn

    from flexp.server.kept import counted

    layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(3))
    for number, layer in enumerate(layers, start=1):
        nn.init.constant_(layer.weight, number)  # type: ignore[arg-type]
    with counted(layers) as kept:
        given = z(4, 16, 32).requires_grad_()
        out = sum(layer(given) for layer in layers)
    assert kept.bytes == 4 * 16 * 32 * 4
    out.sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, torch.full((4, 16, 32), 32.0 * (1 + 2 + 3)))


def test_whoever_fills_the_server_is_refused_and_others_are_not() -> None:
    one = 4 * 16 * 32 * 4
    here = world("llama", config=ServerConfig(max_kept_bytes=8 * one, max_in_flight=100))
    for name in ("greedy", "a", "b", "c"):
        here.join(name, (1, 4))

    def fill() -> None:
        for number in range(100):
            here.server.answer("greedy", ForwardRequest(number, z(4, 16, 32), train=True))

    with pytest.raises(LinkError, match=r"beyond its share of server\.max_kept_bytes"):
        fill()
    for name in "abc":
        for number in range(2):
            here.server.answer(name, ForwardRequest(number, z(4, 16, 32), train=True))
    assert sum(session.kept_bytes for session in here.server._sessions.values()) <= 2 * 8 * one


def test_who_holds_nothing_comes_again_where_others_fill_the_server() -> None:
    one = 4 * 16 * 32 * 4
    here = world("llama", config=ServerConfig(max_kept_bytes=8 * one, max_in_flight=100))
    for name in ("a", "b", "c", "d"):
        here.join(name, (1, 4))
    for number in range(3):
        here.server.answer("a", ForwardRequest(number, z(4, 16, 32), train=True))
        here.server.answer("b", ForwardRequest(number, z(4, 16, 32), train=True))
    large = ForwardRequest(0, z(12, 16, 32), train=True)  # 3 of 8, of which 2 are its share
    with pytest.raises(LinkLostError, match=r"others fill server\.max_kept_bytes, .*do the step again"):
        here.server.answer("c", large)
    for number in range(3):
        here.server.answer("a", BackwardRequest(number, z(4, 16, 32), step=1 + number))
    here.server.answer("c", large)
    with pytest.raises(LinkError, match="send a backward first") as refused:
        here.server.answer("d", ForwardRequest(0, z(36, 16, 32), train=True))  # there will never be room
    assert not isinstance(refused.value, LinkLostError)


def test_gradients_of_steps_that_are_never_complete_count() -> None:
    here = world("llama", config=ServerConfig(max_kept_bytes=600_000))
    here.join("a", (1, 4))
    weights = sum(value.numel() * 4 for value in here.server.shared.updater.parameters.values())

    def begin_steps() -> None:
        for number in range(1, 9):
            here.server.answer("a", ForwardRequest(number, z(), train=True))
            here.server.answer("a", BackwardRequest(number, z(), step=number, exchanges=2))

    with pytest.raises(LinkError, match="wait for its backwards"):
        begin_steps()
    assert here.server._sessions["a"].kept_bytes < 600_000 + weights


def test_a_forward_that_waits_too_long_is_given_up() -> None:
    here = world("llama", config=ServerConfig(exchange_seconds=0.05))
    for name in "ab":
        here.join(name, (1, 4))
    here.server.answer("a", ForwardRequest(1, z(), train=True))
    time.sleep(0.06)
    here.server.answer("b", ForwardRequest(1, z(), train=True))
    assert here.server.counts()["in_flight"] == 1
    with pytest.raises(LinkLostError, match=r"comes after 0\.\d+ s, and it was given up \(server\.exchange_seconds"):
        here.server.answer("a", BackwardRequest(1, z()))
