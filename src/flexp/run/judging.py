"""What a client refuses of its server's orders: what its own settings do not say, or say and would not get."""

from __future__ import annotations

from flexp.client.meeting import LAST
from flexp.config import RunConfig
from flexp.errors import LinkError
from flexp.links.messages import Order
from flexp.methods.turns import GATHER, Place, steps_before
from flexp.run.gathering import all_of

MOST_RUN = 200
"""Letters of a run's name."""
SAME = "set the same method.name, method.meet, model.head, train.rounds and train.steps_per_round on both sides"


def judge(order: Order, config: RunConfig, steps: int, met: int, *, begun: bool) -> None:
    """Refuse what no server of the client's run would order.

    Args:
        steps: that the client has done.
        met: how many meetings and averages it has been at.
        begun: whether it has anything that training gave it.

    Raises:
        LinkError: more steps, which would give the server more gradients; steps where the settings say that all meet
            first; a meeting or an average that they do not say; or a name or number that cannot be.
    """
    train, places = config.train, all_of(config)
    if order.what == "step":
        if not 1 <= order.count <= train.total_steps - steps:
            raise LinkError(
                f"the server orders {order.count} steps after {steps}, and this run has {train.total_steps}; set the "
                "same train.rounds and train.steps_per_round on both sides"
            )
        if met < len(places) and steps <= steps_before(places[met], train) < steps + order.count:
            raise LinkError(f"the server orders {order.count} steps after {steps}, and {_lacking(places[met])}")
    if order.what in GATHER:
        place = Place(order.what, number=order.number)  # type: ignore[arg-type]
        if place not in places:
            raise LinkError(
                f"the server orders {order.what} {order.number}, and by this client's settings there is none: {SAME}"
            )
        if begun and places.index(place) < met:
            raise LinkError(f"the server orders {order.what} {order.number}, which this client has been at")
    if len(order.run) > MOST_RUN or min(order.number, order.save or 0) < 0:
        raise LinkError("the server's order names a run or a snapshot that cannot be")


def judge_end(config: RunConfig, steps: int, met: int, *, early: bool) -> None:
    """Refuse an end before the client's own; what it has is saved by then.

    Args:
        early: whether the client has said that it stops early.

    Raises:
        LinkError: see above.
    """
    if steps < config.train.total_steps and not early:
        raise LinkError(
            f"the server ends the run, and this client has done {steps} of the {config.train.total_steps} steps that "
            f"its settings say; what it has is saved: {SAME}"
        )
    last = Place("meet", number=LAST)
    lacking = [place for place in all_of(config)[met:] if place == last or not early]
    if lacking:
        raise LinkError(f"the server ends the run, and {_lacking(lacking[0])}; what was trained is saved")


def _lacking(place: Place) -> str:
    return f"by this client's settings there is {place.what} {place.number} before: {SAME}"
