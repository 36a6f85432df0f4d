"""A step that fails half-way leaves nothing behind, on either side."""

from __future__ import annotations

from typing import Any

import pytest

from flexp.client.exchange import Piece
from flexp.config import ServerConfig
from flexp.errors import LinkError
from flexp.links.messages import Abort, Leave
from tests.harness import RecordingLink, World, equal, shared_weights, world


def step(here: World, model: Any, *, fail: int | None = None) -> None:
    """Two pieces and plain SGD; before the backward of piece ``fail`` something goes wrong."""
    for number in (1, 2):
        with model.part_of_step(Piece(number, 2, 0.5, 0.5)):
            loss = model(**here.batch(seed=number)).loss
            if number == fail:
                raise RuntimeError("out of memory")
            (loss * 0.5).backward()


@pytest.mark.parametrize("fail", [1, 2])
def test_a_failed_piece_gives_up_its_step_on_the_server_too(fail: int) -> None:
    here, other = world(), world()
    link = RecordingLink(here.server.connect("a"))
    model, undisturbed = here.client("a", (2, 4), link=link), other.client("a", (2, 4))
    with pytest.raises(RuntimeError, match="out of memory"):
        step(here, model, fail=fail)
    assert len(list(link.sent(Abort))) == 1
    assert not here.server.shared._held
    assert not here.server._sessions["a"].gathered
    assert model.steps.done == 0
    model.zero_grad()
    step(here, model)
    step(other, undisturbed)
    assert equal(shared_weights(here.server), shared_weights(other.server))
    assert model.steps.done == here.server.shared.version == 1
    here.server.state()  # nothing is left in the middle of a step


def test_a_link_that_is_gone_does_not_hide_the_first_failure() -> None:
    here = world()
    model = here.client("a", (2, 4))

    def fail() -> None:
        with model.part_of_step(Piece()):
            here.server.answer("a", Leave())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()


def test_forwards_that_were_never_trained_lock_nobody_out() -> None:
    here = world(config=ServerConfig(max_in_flight=2))
    careless, other = here.client("a", (2, 4)), here.client("b", (2, 4))
    for _ in range(2):
        careless(**here.batch())
    with pytest.raises(LinkError, match=r"max_in_flight.*model\.abort\(\)"):
        careless(**here.batch())
    other(**here.batch()).loss.backward()
    careless.abort()
    careless(**here.batch()).loss.backward()
    assert here.server.shared.version == 2
