"""What one device decides while it trains: sheds at once, moves only for a gain that lasts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexp.config import RecutConfig
from flexp.cost.choice import Choice, Prediction
from flexp.planner.options import Option
from flexp.planner.policy import HOLD, DevicePolicy, Situation

MIB = 2**20
RULES = RecutConfig(on=True, gain=0.1, patience=2, pause=10)


def option(start: int, micro: int = 8, *, memory: int, client: float, server: float = 0.1) -> Option:
    link = 0.2
    found = Prediction(memory * MIB, client + server + link, client, server, link, client, 1000, 1000, 0)
    return Option(Choice((start, 6), micro, 8 // micro), found, 0.01 * start)


SHALLOW = option(1, memory=100, client=0.3, server=0.5)
MIDDLE = option(3, memory=200, client=0.6, server=0.3)
MIDDLE_SMALL = option(3, 2, memory=150, client=0.8, server=0.3)
DEEP = option(5, memory=300, client=1.0, server=0.1)
ALL = [SHALLOW, MIDDLE, MIDDLE_SMALL, DEEP]


def watch(current: Option, rules: RecutConfig = RULES) -> DevicePolicy:
    return DevicePolicy(ALL, current.choice, rules)


def test_memory_that_runs_short_is_answered_at_once_with_smaller_exchanges_first() -> None:
    here = watch(MIDDLE)
    found = here.look(Situation(190 * MIB), step=1, left=100)
    assert found is not None
    assert (found.choice, found.why, found.fits) == (MIDDLE_SMALL.choice, "memory", True)
    here.moved(found.choice, 1)
    found = here.look(Situation(120 * MIB), step=2, left=1)  # neither a pause nor the end holds it back
    assert found is not None
    assert (found.choice, found.why) == (SHALLOW.choice, "memory")
    here.moved(found.choice, 2)
    assert here.look(Situation(80 * MIB), step=3, left=100) is None  # nothing takes less: hope
    assert watch(DEEP).look(Situation(80 * MIB), step=3, left=9).fits is False  # type: ignore[union-attr]


def test_what_is_held_needs_less_room_than_what_is_new() -> None:
    room = int(200 * MIB * (1 + HOLD)) + 1
    assert watch(MIDDLE, RULES.model_copy(update={"gain": 1.0})).look(Situation(room), step=1, left=100) is None
    found = watch(MIDDLE).look(Situation(room - 2), step=1, left=100)
    assert found is not None
    assert found.choice != MIDDLE.choice


def test_a_gain_must_last_and_a_move_must_have_time_to_pay() -> None:
    slow = Situation(1000 * MIB, client=8.0)  # computing here has become slow: less of it
    here = watch(DEEP)
    assert here.look(slow, step=20, left=100) is None
    found = here.look(slow, step=25, left=100)
    assert found is not None
    assert (found.choice, found.why) == (SHALLOW.choice, "gain")
    assert found.gain > 0.5
    here.moved(found.choice, 25)
    fast = Situation(1000 * MIB, server=30.0)
    assert here.look(fast, step=30, left=100) is None
    assert here.look(fast, step=34, left=100) is None  # too early after a move
    assert here.look(fast, step=35, left=9) is None  # too late before the end
    assert here.look(fast, step=40, left=100) is not None


def test_one_bad_look_between_good_ones_moves_nobody() -> None:
    here, slow, well = watch(DEEP), Situation(1000 * MIB, client=8.0), Situation(1000 * MIB, server=6.0)
    assert [here.look(now, step=20 + n, left=99) for n, now in enumerate((slow, well, slow, well))] == [None] * 4


def test_a_cut_that_the_server_refuses_is_not_asked_for_again() -> None:
    here, slow = watch(DEEP), Situation(1000 * MIB, client=8.0)
    here.look(slow, step=20, left=100)
    found = here.look(slow, step=25, left=100)
    assert found is not None
    here.refused(found.choice)
    here.look(slow, step=30, left=100)
    found = here.look(slow, step=35, left=100)
    assert found is not None
    assert found.choice.cut == (3, 6)


@given(st.integers(50, 400), st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10), st.sampled_from(ALL))
def test_in_a_situation_that_stays_it_moves_at_most_once_for_a_gain(
    memory: int, client: float, server: float, link: float, current: Option
) -> None:
    here, now = watch(current), Situation(memory * MIB, client, server, link)
    moves = []
    for step in range(1, 200, 5):
        found = here.look(now, step, 1000 - step)
        if found is not None:
            moves.append(found.why)
            here.moved(found.choice, step)
    assert moves.count("gain") <= 1
    assert moves.count("memory") <= 1
