"""A client reaches nothing of another's: neither activations and gradients, nor what is in flight, nor state.

Over each link the honest client's run beside an intruder must be, bit for bit, its run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import AlignConfig, CodecConfig
from flexp.errors import LinkError
from flexp.links.asking import EndGeneration, ExtendRequest, PullRequest
from flexp.links.base import Link, ask
from flexp.links.grpc import connect, serve
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Join
from flexp.links.opening import connected
from flexp.rng import RandomStream
from tests.harness import World, seeded, world

from .grpc_tools import SOON

HIDDEN = 32
OFF = CodecConfig()
KL = AlignConfig(kind="kl", weight=0.3)


def drawn(number: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, HIDDEN)), generator=seeded(number))


@dataclass
class Both:
    """Links of the honest client ``a`` and of the intruder ``b`` to one server."""

    here: World
    a: Link
    b: Link
    heard: list[Tensor] = field(default_factory=list)

    def join(self, link: Link, name: str, cut: tuple[int, int] = (2, 4), **changes: Any) -> None:
        ask(link, Join(**(self.here.card(name, cut) | {"align": KL, "codec": OFF} | changes)))

    def refused(self, words: str, call: Callable[[], Any]) -> None:
        with pytest.raises(LinkError, match=words):
            call()


@contextmanager
def both(kind: str, dropout: float = 0.2) -> Iterator[Both]:
    here = world("bert", dropout=dropout)
    # Weights that stand still: what one client trains would reach the other through them, as it is meant to.
    here.server.shared.add = lambda *_, **__: False  # type: ignore[method-assign]
    if kind == "in-process":
        yield Both(here, here.server.connect("a"), here.server.connect("b"))
        return
    with serve(here.server) as serving, ExitStack() as stack:
        links = [stack.enter_context(connected(connect(f"grpc://{serving.address}", name))) for name in "ab"]
        yield Both(here, *links)


LINKS = pytest.mark.parametrize("kind", ["in-process", "grpc"])


def forward(number: int, **changes: Any) -> ForwardRequest:
    given = ForwardRequest(number, drawn(number), base_BTH=drawn(50 + number), train=True, step=1)
    return replace(given, **changes)


def intrude(pair: Both, number: int) -> None:
    """All that the intruder can say with a's numbers in it."""
    link = pair.b
    pair.refused("names another client, a", lambda: pair.join(link, "a"))
    pair.refused(
        f"client b: exchange {number} has no forward in flight",
        lambda: link.call(BackwardRequest(number, drawn(9))).result(SOON),
    )
    pair.refused(
        "client b: answer 1 goes on after 5 tokens, but the server holds 0",
        lambda: link.call(ExtendRequest(1, 5, drawn(8, 2, 1, HIDDEN))).result(SOON),
    )
    for start, stop in ((0, 1), (1, 4), (2, 3), (3, 4), (-1, 2)):
        pair.refused(
            rf"client b: the weights of blocks \[{start}, {stop}\) were asked for",
            lambda start=start, stop=stop: link.call(PullRequest(start, stop, 1)).result(SOON),
        )
    ask(link, EndGeneration(1))
    ask(link, Abort())
    for step in (1, 2):  # the numbers of a's steps and exchanges
        link.call(forward(number, hidden_BTH=drawn(70), step=step)).result(SOON)
        link.call(BackwardRequest(number, drawn(71), step=step)).result(SOON)
    link.call(forward(number + 1, hidden_BTH=drawn(72))).result(SOON)
    pair.join(link, "b")


def honest(pair: Both, between: Callable[[int], None]) -> list[Tensor]:
    """Two steps of two exchanges each, and an answer under way; all that comes down."""
    found: list[Tensor] = []
    with RandomStream(3).active():
        pair.join(pair.a, "a", numbering=77)
    for step in (1, 2):
        numbers = (2 * step - 1, 2 * step)
        for number in numbers:
            reply = pair.a.call(forward(number, step=step)).result(SOON)
            found += [reply.hidden_BTH, torch.tensor(reply.align)]
        between(numbers[0])
        for number in numbers:
            request = BackwardRequest(number, drawn(20 + number), step=step, exchanges=2, tokens=0.5)
            found.append(pair.a.call(request).result(SOON).grad_BTH)
            between(numbers[1] if number == numbers[0] else 99)
        found += list(pair.a.call(PullRequest(1, 2, step)).result(SOON).weights.values())
    return [value.clone() for value in found]


@LINKS
def test_a_run_beside_an_intruder_is_the_run_alone(kind: str) -> None:
    with both(kind) as alone:
        expected = honest(alone, lambda number: None)
        state = {key for key in alone.here.server.state() if key.endswith("/a")}
    with both(kind) as pair:
        pair.join(pair.b, "b", numbering=77)  # even with a's numbering
        got = honest(pair, lambda number: intrude(pair, number))
        beside = pair.here.server.state(unfinished=True)
    assert len(got) == len(expected) > 10
    assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))
    assert not state | {key for key in beside if key.endswith("/a")}  # what it draws follows from its exchanges


@LINKS
def test_what_is_answered_to_one_is_not_in_what_is_answered_to_the_other(kind: str) -> None:
    """The same request of another client gets that client's answer: dropout is its own, and so are cut and history."""
    with both(kind) as pair:
        pair.join(pair.a, "a", numbering=5)
        pair.join(pair.b, "b", (3, 4), numbering=5)
        ours = pair.a.call(forward(1)).result(SOON).hidden_BTH
        theirs = pair.b.call(forward(1)).result(SOON).hidden_BTH
        assert not torch.equal(ours, theirs)
        gradient = BackwardRequest(1, drawn(21), step=1)
        down = pair.a.call(gradient).result(SOON).grad_BTH
        again = pair.b.call(gradient).result(SOON).grad_BTH
        assert not torch.equal(down, again)
        # a's step 1 has been applied and answered; b's step 1 is b's own, and asks for no answer of a's.
        assert pair.here.server.clients["a"].progress.newest == pair.here.server.clients["b"].progress.newest == 1


@LINKS
def test_leaving_and_being_quarantined_concern_nobody_else(kind: str) -> None:
    with both(kind, dropout=0.0) as pair:
        pair.join(pair.a, "a")
        pair.join(pair.b, "b")
        pair.a.call(forward(1)).result(SOON)
        bad = replace(forward(4), hidden_BTH=torch.full((2, 5, HIDDEN), torch.nan))
        for _ in range(pair.here.server.config.guard.strikes):
            assert isinstance(pair.b.call(bad).exception(SOON), LinkError)
        assert pair.here.server.aside("b") is not None
        assert pair.here.server.aside("a") is None
        pair.a.call(BackwardRequest(1, drawn(21), step=1)).result(SOON)
        assert pair.here.server.clients["b"].progress.newest == 0
