"""Planning again for devices that have changed: who must, who had better, who cannot."""

from __future__ import annotations

from typing import Any

from flexp.cost.choice import Choice
from flexp.planner.fleet import Fleet
from flexp.planner.plan import make_plan
from flexp.planner.replan import replan

from .fakes import MB, FakeCosts, fleet

CHOICES = {"tails": [0], "micro_batches": [8], "checkpointing": [False]}
DEEP, SHALLOW = Choice((3, 4), 8), Choice((1, 4), 8)


def pair(**second: Any) -> Fleet:
    devices = [{"name": "north"}, {"name": "south", **second}]
    return fleet(devices, choices=CHOICES, server={"class": "raspberry-pi"})


def test_on_the_devices_that_it_was_made_for_a_plan_stays() -> None:
    costs = FakeCosts(server_flops=30e9)
    plan = make_plan(pair(), costs)
    current = {name: plan.choice(name) for name in ("north", "south")}
    found = replan(pair(), costs, current, gain=0.0)
    assert not found.choices
    assert not found.lacking


def test_a_gain_below_the_threshold_moves_nobody() -> None:
    costs = FakeCosts()
    current = {"north": DEEP, "south": DEEP}
    best = replan(pair(), costs, current, gain=0.01)
    assert set(best.choices) == {"north", "south"}
    assert 0.01 < best.gain < 0.99
    assert not replan(pair(), costs, current, gain=best.gain + 0.001).choices
    assert not replan(pair(), costs, current, gain=0.0, move=False).choices


def test_who_does_not_fit_any_more_moves_alone_whatever_that_gains() -> None:
    costs = FakeCosts()
    needed = costs.memory(fleet([{"name": "a"}]).task, DEEP)
    found = replan(pair(memory_bytes=needed - MB), costs, {"north": DEEP, "south": DEEP}, gain=0.99)
    assert set(found.choices) == {"south"}
    assert found.choices["south"].cut[0] < 3
    stuck = replan(pair(memory_bytes=needed - MB), costs, {"north": DEEP, "south": DEEP}, gain=0.99, move=False)
    assert set(stuck.lacking) == {"south"}
    assert stuck.lacking["south"] == "needs 156 MiB, and laptop has 155"


def test_who_fits_nowhere_is_named_and_the_others_go_on() -> None:
    found = replan(pair(memory_bytes=MB), FakeCosts(), {"north": SHALLOW, "south": SHALLOW}, gain=0.1)
    assert set(found.lacking) == {"south"}
    assert not found.choices
    alone = fleet([{"name": "south", "memory_bytes": MB}], choices=CHOICES)
    assert set(replan(alone, FakeCosts(), {"south": SHALLOW}, gain=0.1).lacking) == {"south"}
