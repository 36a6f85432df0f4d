"""A step is applied once, however often and in whatever pieces it is sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flexp.config import ServerConfig
from flexp.errors import LinkError
from flexp.links.asking import PullRequest
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardRequest, Leave
from flexp.server.clients import WINDOW, Progress
from tests.harness import World, equal, seeded, shared_weights, world

MINE, OTHERS = 77, 78


def joined(numbering: int = MINE, **options: Any) -> World:
    here = world("bert", dropout=0.2, remembers=True, **options)
    here.join("a", (2, 4), numbering=numbering)
    return here


def request(step: int, piece: int = 1) -> ForwardRequest:
    hidden = torch.randn(2, 5, 32, generator=seeded(step))
    return ForwardRequest(step << 16 | piece, hidden, train=True, step=step)


def gradient(step: int, piece: int = 1, of: int = 1) -> BackwardRequest:
    grad = 1e-2 * torch.randn(2, 5, 32, generator=seeded(100 + step))
    return BackwardRequest(step << 16 | piece, grad, step, of)


def do(here: World, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    h = here.server.answer("a", request(step)).hidden_BTH
    return h, here.server.answer("a", gradient(step)).grad_BTH


def test_a_step_that_comes_again_is_answered_and_not_applied() -> None:
    here, other = joined(), joined()
    first = do(here, 1)
    after = shared_weights(here.server)
    again = do(here, 1)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    assert equal(after, shared_weights(here.server))
    do(other, 1)
    for side in (here, other):  # and what comes after it is as if it had come once, dropout and all
        do(side, 2)
    assert equal(shared_weights(here.server), shared_weights(other.server))
    assert here.server.shared.version == 2


def test_what_comes_again_in_another_size_is_answered_in_that_size_and_not_applied() -> None:
    """Found by fuzzing: the answer of the first size was sent. A client with less memory may come with less."""
    here = joined()
    do(here, 1)
    after = shared_weights(here.server)
    z = torch.randn(1, 5, 32)
    assert here.server.answer("a", replace(request(1), hidden_BTH=z)).hidden_BTH.shape == z.shape
    assert here.server.answer("a", replace(gradient(1), grad_BTH=torch.ones(1, 5, 32))).grad_BTH.shape == z.shape
    assert equal(shared_weights(here.server), after)
    assert here.server.shared.version == 1


def test_a_backward_whose_answer_was_lost() -> None:
    here = joined()
    here.server.answer("a", request(1))
    first = here.server.answer("a", gradient(1)).grad_BTH
    assert torch.equal(here.server.answer("a", gradient(1)).grad_BTH, first)
    assert here.server.shared.version == 1


@pytest.mark.parametrize("when", ["after the forward", "after half of the step"])
def test_a_step_that_is_given_up_is_done_again_as_the_first_time(when: str) -> None:
    here, other = joined(), joined()
    halves = 2 if when == "after half of the step" else 1
    for side in (here, other):
        do(side, 1)
    here.server.answer("a", request(2))
    if halves == 2:
        here.server.answer("a", gradient(2, of=2))
    here.server.answer("a", Leave())  # the connection broke
    here.join("a", (2, 4), numbering=MINE)
    for side in (here, other):
        for piece in range(1, halves + 1):
            side.server.answer("a", request(2, piece))
            side.server.answer("a", gradient(2, piece, halves))
    assert equal(shared_weights(here.server), shared_weights(other.server))


def test_another_numbering_begins_anew() -> None:
    here = joined()
    do(here, 1)
    here.join("a", (2, 4), numbering=OTHERS)
    do(here, 1)
    assert here.server.shared.version == 2
    here.join("a", (2, 4), numbering=0)
    for _ in range(2):
        here.server.answer("a", replace(request(0), exchange=5))
        here.server.answer("a", replace(gradient(0), exchange=5))
    assert here.server.shared.version == 4


def test_the_state_knows_what_was_applied() -> None:
    here, other = joined(), joined()
    for step in (1, 2):
        do(here, step)
    other.server.load({name: value.clone() for name, value in here.server.state().items()})
    other.join("a", (2, 4), numbering=MINE)
    other.server.answer("a", request(2))  # the answer is not part of the state, so it is computed, without effect
    other.server.answer("a", gradient(2))
    assert equal(shared_weights(here.server), shared_weights(other.server))
    assert other.server.shared.version == 2


def test_answers_are_kept_from_the_last_snapshot_on() -> None:
    here = joined()
    here.server.keep_answers_after("a", 0)
    for step in (1, 2, 3):
        do(here, step)
    progress = here.server.clients["a"].progress
    assert all(progress.answer(step, ("forward", step << 16 | 1)) is not None for step in (1, 2, 3))
    here.server.keep_answers_after("a", 2)
    assert progress.answer(2, ("forward", 2 << 16 | 1)) is None
    assert progress.answer(3, ("forward", 3 << 16 | 1)) is not None


def test_pulled_weights_are_those_of_the_first_time() -> None:
    here = joined()
    do(here, 1)
    start = shared_weights(here.server)
    one = here.server.answer("a", PullRequest(1, 2, 1, most=1)).weights
    here.server.answer("b", replace(here.server._sessions["a"].join, client="b", cut=(1, 4), numbering=5))
    hidden = torch.randn(2, 5, 32, generator=seeded(9))
    here.server.answer("b", ForwardRequest(1 << 16 | 1, hidden, train=True, step=1))
    here.server.answer("b", gradient(1))
    rest = here.server.answer("a", PullRequest(1, 2, 1, first=1)).weights
    first = {name: value for name, value in start.items() if name.startswith("bert.encoder.layer.1.")}
    assert len(one) == 1 < len(rest)
    assert equal(one | rest, first)  # in however many portions
    assert equal(here.server.answer("a", PullRequest(1, 2, 1)).weights, first)
    assert not equal(here.server.answer("a", PullRequest(1, 2, 2)).weights, first)


@pytest.mark.parametrize("step", [0, 1])
def test_portions_are_of_one_version_where_no_answers_are_remembered(step: int) -> None:
    here = world("bert")
    here.join("a", (2, 4))
    here.join("b", (1, 4))
    start = {k: v for k, v in shared_weights(here.server).items() if k.startswith("bert.encoder.layer.1.")}
    found = here.server.answer("a", PullRequest(1, 2, step, most=1)).weights
    here.server.answer("b", request(1))
    here.server.answer("b", gradient(1))
    found |= here.server.answer("a", PullRequest(1, 2, step, first=1)).weights
    assert equal(found, start)
    assert not equal(here.server.answer("a", PullRequest(1, 2, step)).weights, start)


def test_a_saved_server_in_the_middle_of_a_step() -> None:
    here, other = joined(), joined()
    do(here, 1)
    here.server.answer("a", request(2))
    with pytest.raises(LinkError, match="in the middle of a step of a"):
        here.server.state()
    other.server.load({name: value.clone() for name, value in here.server.state(unfinished=True).items()})
    other.join("a", (2, 4), numbering=MINE)
    here.server.answer("a", gradient(2))
    do(other, 2)
    assert equal(shared_weights(here.server), shared_weights(other.server))


def test_steps_in_any_order_within_the_window() -> None:
    progress = Progress(MINE)
    for step in (3, 1, 2 * WINDOW):
        assert not progress.applied(step)
        progress.apply(step)
    assert progress.applied(3)  # far behind: whatever it was, it is over
    assert not progress.applied(2 * WINDOW - 1)
    back = Progress.restored(progress.state())
    assert (back.numbering, back.newest, back.applied(2 * WINDOW), back.applied(0)) == (MINE, 2 * WINDOW, True, False)


def test_answers_of_one_step_are_bounded_too_and_computed_anew_where_they_are_gone() -> None:
    progress, one = Progress(MINE), BackwardReply(torch.zeros(25))
    for piece in range(1, 9):
        progress.remember(1, ("forward", piece), one, 250)
    assert [progress.answer(1, ("forward", piece)) for piece in range(1, 9)] == [None] * 8  # a step is kept whole
    progress.remember(2, ("forward", 1), one, 250)
    assert progress.answer(2, ("forward", 1)) is one

    here = joined(config=ServerConfig(keep_answers_bytes=2 * 5 * 32 * 4 * 3))  # three of a step's four
    for order in ("fbfb", "ffbb", "fbfb"):
        forwards, backwards = iter((1, 2)), iter((1, 2))
        for what in order:
            if what == "f":
                here.server.answer("a", request(1, next(forwards)))
            else:
                assert here.server.answer("a", gradient(1, next(backwards), of=2)).grad_BTH is not None
        assert not here.server._sessions["a"].gathered
        assert here.server.shared.version == 1
    here.server.state()  # nothing is left in the middle of a step
