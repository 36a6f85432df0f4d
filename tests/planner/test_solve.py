"""The solver against every plan one by one, what pruning may not change, and fleets of a thousand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.cost.choice import Choice, Prediction
from flexp.planner.accuracy import prior
from flexp.planner.fleet import Weights
from flexp.planner.options import Option, prune
from flexp.planner.plan import counts, make_plan
from flexp.planner.plan import settings as problems
from flexp.planner.problem import Group, Problem, scales
from flexp.planner.solve import solve

from .fakes import FakeCosts, best_by_hand, every_plan, fleet

amount = st.integers(1, 20)


@st.composite
def options(draw: st.DrawFn) -> Option:
    start = draw(st.integers(0, 2))
    seconds, server = draw(amount) / 10, draw(amount) / 40
    prediction = Prediction(
        memory_bytes=1,
        step_seconds=seconds + server,
        client_seconds=seconds,
        server_seconds=server,
        link_seconds=0.0,
        energy_joules=float(draw(amount)),
        bytes_up=draw(amount),
        bytes_down=draw(amount),
        server_memory_bytes=draw(amount),
    )
    choice = Choice((start, draw(st.integers(start + 1, 3))), draw(st.integers(1, 8)))
    return Option(choice, prediction, draw(amount) / 200)


@st.composite
def problem(draw: st.DrawFn) -> Problem:
    """At most three groups of at most three clients, with a server that is often too small."""
    groups = tuple(
        Group(
            tuple(f"{number}-{index}" for index in range(draw(st.integers(1, 3)))),
            tuple(draw(st.lists(options(), min_size=1, max_size=4))),
            draw(st.sampled_from([None, None, 1.0, 3.0])),
        )
        for number in range(draw(st.integers(1, 3)))
    )
    weights = Weights(**{name: draw(st.sampled_from([0.0, 0.3, 1.0])) for name in Weights.model_fields})
    memory, block = draw(st.integers(1, 120)), draw(st.integers(0, 20))
    limits = {"accuracy": draw(amount) / 200} if draw(st.booleans()) else None
    return Problem(groups, memory, (block,) * 3, weights, scales(groups), draw(st.integers(1, 2)), limits)


@settings(max_examples=60, deadline=None)
@given(problem())
def test_the_optimum_is_that_of_all_plans(given_problem: Problem) -> None:
    best, found = best_by_hand(given_problem), solve(given_problem)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.measures.objective == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert given_problem.allows(counts(given_problem, found), slack=1e-6)
    assert set(found.options) == {name for group in given_problem.groups for name in group.clients}


@settings(max_examples=60, deadline=None)
@given(problem(), st.booleans())
def test_pruning_keeps_the_optimum(given_problem: Problem, roomy: bool) -> None:
    """With a server's memory that may run short, and with one that cannot (then more is pruned)."""
    if roomy:
        given_problem = replace(given_problem, server_memory=10**9)
    tight = given_problem.memory_may_run_short
    groups = tuple(replace(group, options=tuple(prune(group.options, tight))) for group in given_problem.groups)
    pruned = replace(given_problem, groups=groups)
    best, found = best_by_hand(given_problem), best_by_hand(pruned)
    assert (best is None) == (found is None)
    assert best is None or found == pytest.approx(best, rel=1e-12)


def test_pruning_leaves_only_what_nothing_beats() -> None:
    made = FakeCosts()
    (setting,) = problems(fleet([{"name": "one"}]), made, prior(), pruned=False)
    kept = prune(setting.problem.groups[0].options, server_memory=False)
    # Everything fits: checkpointing and small exchanges only cost. (2, 4) equals (1, 3), and (3, 4) equals (2, 3).
    found = [(option.choice.cut, option.choice.checkpointing, option.choice.micro_batch) for option in kept]
    assert found == [((1, 3), False, 8), ((1, 4), False, 8), ((2, 3), False, 8)]
    for option in kept:
        for other in kept:
            beaten = all(a <= b for a, b in zip(other.costs(False), option.costs(False), strict=True))
            assert other is option or not beaten


def test_equal_clients_share_a_small_server() -> None:
    """With room on the server for one shallow cut, one of two equal laptops gets it; with less, both go deeper."""
    made = FakeCosts()
    # s = 1: 3 shared blocks of 40 MB, and 3 · 8 MB in flight for each; s = 3: one block, and 8 MB.
    two = [{"name": "a"}, {"name": "b"}]
    choices = {"tails": [0], "micro_batches": [8], "checkpointing": [False]}
    wanted = {168: [(1, 4), (1, 4)], 160: [(1, 4), (2, 4)], 152: [(2, 4), (2, 4)], 56: [(3, 4), (3, 4)]}
    for memory, cuts in wanted.items():
        server = {"class": "server", "memory_bytes": memory * 10**6}
        plan = make_plan(fleet(two, server=server, choices=choices, margin=0.0), made)
        assert sorted(option.choice.cut for option in plan.solution.options.values()) == cuts
        assert plan.measures.server_memory_bytes <= memory * 10**6


def test_the_servers_time_bounds_what_clients_leave_to_it() -> None:
    """Ten fast clients of a slow server: together they would need 10 · 3 blocks, which takes 2.4 s."""
    made = FakeCosts(server_flops=100e9)
    ten = [{"name": "fast", "class": "workstation", "count": 10, "uplink_bps": 1e12}]
    choices = {"tails": [0]}
    free = make_plan(fleet(ten, choices=choices, weights={"accuracy": 100.0}), made)
    assert free.measures.server_seconds == pytest.approx(2.4)
    assert free.measures.round_seconds == pytest.approx(2.4)  # the server, not a client's 0.24 s
    timed = [{**ten[0], "deadline_s": 1.6}]
    bound = make_plan(fleet(timed, choices=choices, weights={"accuracy": 100.0}), made)
    assert bound.measures.server_seconds <= 1.6 * (1 + 1e-9)
    assert bound.measures.server_seconds == pytest.approx(1.6)  # 20 blocks instead of 30
    quick = make_plan(fleet(ten, choices=choices, weights={"accuracy": 0.0}), made)
    assert {option.choice.cut for option in quick.solution.options.values()} == {(3, 4)}


def test_a_thousand_devices_are_a_few_groups() -> None:
    """Six kinds, whatever their number: each is predicted once, and the solver sees six groups."""
    names = ("phone", "raspberry-pi", "jetson", "laptop", "workstation")
    devices: list[dict[str, Any]] = [{"name": name, "class": name, "count": 199} for name in names]
    devices.append({"name": "slow", "class": "phone", "flops": 1e9, "count": 5})
    made = FakeCosts(server_flops=5e12)
    server = {"class": "server", "memory_bytes": 9_000 * 10**6}  # tight: not everybody can cut shallow
    plan = make_plan(fleet(devices, server=server, choices={"codecs": ["none", "int8"]}), made)
    assert len(plan.solution.options) == 1000
    assert len(plan.setting.problem.groups) == 6
    assert made.asked == 6 * 5 * 4 * 2 * 2  # cuts · micro-batches · checkpointing · codecs
    assert plan.measures.server_memory_bytes <= 9_000 * 10**6


def test_no_weight_on_the_round_is_solved_client_by_client() -> None:
    made = FakeCosts()
    weights = {"round": 0.0, "time": 1.0, "energy": 0.0, "bytes": 0.0, "accuracy": 0.0}
    plan = make_plan(fleet([{"name": "a"}, {"name": "b", "class": "phone"}], weights=weights), made)
    for kind in plan.setting.kinds:
        (name,) = kind.names
        taken = plan.solution.options[name].prediction.step_seconds
        assert taken == min(option.prediction.step_seconds for option in kind.options)


def test_the_best_rank_is_one_for_all() -> None:
    made = FakeCosts()
    plan = make_plan(fleet([{"name": "a"}, {"name": "b"}], choices={"ranks": [4, 16]}), made)
    assert {option.choice.rank for option in plan.solution.options.values()} == {16}  # equal but for accuracy
    assert [setting.rank for setting in plan.settings] == [4, 16]


def test_every_plan_counts_each_client_once() -> None:
    (setting,) = problems(fleet([{"name": "a", "count": 2}], choices={"tails": [0]}), FakeCosts(), prior())
    for ways in every_plan(setting.problem):
        assert sum(ways[0].values()) == 2
