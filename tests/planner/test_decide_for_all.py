"""Planning again for devices that have changed: who must, who had better, who cannot."""

from __future__ import annotations

from typing import Any

from flexp.cost.choice import Choice
from flexp.planner.fleet import Fleet
from flexp.planner.plan import make_plan
from flexp.planner.policy import Decision, Stop, decide_for_all

from .fakes import MB, FakeCosts, fleet

CHOICES = {"tails": [0], "micro_batches": [8], "checkpointing": [False]}
DEEP, SHALLOW = Choice((3, 4), 8), Choice((1, 4), 8)


def pair(**second: Any) -> Fleet:
    devices = [{"name": "north"}, {"name": "south", **second}]
    return fleet(devices, choices=CHOICES, server={"class": "raspberry-pi"})


def moves(found: dict[str, Decision | Stop]) -> dict[str, Decision]:
    return {name: decision for name, decision in found.items() if isinstance(decision, Decision)}


def test_on_the_devices_that_it_was_made_for_a_plan_stays() -> None:
    costs = FakeCosts(server_flops=30e9)
    plan = make_plan(pair(), costs)
    current = {name: plan.choice(name) for name in ("north", "south")}
    assert not decide_for_all(pair(), costs, current, gain=0.0)


def test_a_gain_below_the_threshold_moves_nobody() -> None:
    costs = FakeCosts()
    current = {"north": DEEP, "south": DEEP}
    best = moves(decide_for_all(pair(), costs, current, gain=0.01))
    assert set(best) == {"north", "south"}
    assert {decision.why for decision in best.values()} == {"gain"}
    assert 0.01 < best["north"].gain == best["south"].gain < 0.99
    assert not decide_for_all(pair(), costs, current, gain=best["north"].gain + 0.001)
    assert not decide_for_all(pair(), costs, current, gain=0.0, move=False)


def test_who_does_not_fit_any_more_moves_alone_whatever_that_gains() -> None:
    costs = FakeCosts()
    needed = costs.memory(fleet([{"name": "a"}]).task, DEEP)
    found = moves(decide_for_all(pair(memory_bytes=needed - MB), costs, {"north": DEEP, "south": DEEP}, gain=0.99))
    assert set(found) == {"south"}
    assert found["south"].choice.cut[0] < 3
    assert found["south"].why == "memory"
    stuck = decide_for_all(pair(memory_bytes=needed - MB), costs, {"north": DEEP, "south": DEEP}, gain=0.99, move=False)
    assert stuck == {"south": Stop("needs 156 MiB, and laptop has 155")}


def test_who_fits_nowhere_is_named_and_the_others_go_on() -> None:
    found = decide_for_all(pair(memory_bytes=MB), FakeCosts(), {"north": SHALLOW, "south": SHALLOW}, gain=0.1)
    assert set(found) == {"south"}
    assert isinstance(found["south"], Stop)
    alone = fleet([{"name": "south", "memory_bytes": MB}], choices=CHOICES)
    assert isinstance(decide_for_all(alone, FakeCosts(), {"south": SHALLOW}, gain=0.1)["south"], Stop)
