"""The optimum beside other plans, and a plan on the virtual clock."""

from __future__ import annotations

import pytest

from benchmarks.tools.other_plans import memory_only, static, virtual_time
from flexp.planner.plan import make_plan
from tests.planner.fakes import FakeCosts, fleet
from tests.planner.test_document import DEEP_IS_BETTER, MIXED


def test_the_optimum_beats_both_baselines_on_the_joint_objective() -> None:
    for curve in (None, DEEP_IS_BETTER):
        for flops in (5e9, 100e9, 5e12):
            plan = make_plan(fleet(MIXED), FakeCosts(server_flops=flops), curve)
            for other in (memory_only(plan), static(plan)):
                assert other is not None
                assert plan.measures.objective <= other.measures.objective * (1 + 1e-9)
    deepest, same = memory_only(plan), static(plan)
    assert deepest is not None
    assert same is not None
    assert {option.choice.cut for option in same.options.values()} == {(1, 4)}  # all that a phone can
    assert [deepest.options[name].choice.cut for name in ("phone-1", "pi", "gpu")] == [(1, 4), (3, 4), (3, 4)]


def test_a_lone_clients_virtual_time_is_its_steps() -> None:
    made = fleet(
        [{"name": "a", "uplink_bps": 1e15, "downlink_bps": 1e15}],
        server={"class": "server", "uplink_bps": 1e15, "downlink_bps": 1e15},
    )
    plan = make_plan(made, FakeCosts())
    clock = virtual_time(made, plan.solution.options, 5)
    step = plan.solution.options["a"].prediction.step_seconds
    assert clock.rounds[-1] == pytest.approx(5 * step, rel=1e-6)
