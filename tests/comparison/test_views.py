from __future__ import annotations

from typing import Any

import pytest

from flexp.comparison import views


def run(seed: int, scores: list[float], up: float, seconds: float | None, virtual: float | None) -> dict[str, Any]:
    """A run of one client that costs ``up`` bytes up, as many down, and some seconds a round."""
    rounds = [
        {
            "round": number,
            "personal": {"a": score},
            "global": {"a": score / 2},
            "bytes_up": up * number,
            "bytes_down": up * number,
            "client_seconds": None if seconds is None else seconds * number,
            "virtual_seconds": None if virtual is None else virtual * number,
        }
        for number, score in enumerate(scores, 1)
    ]
    return {"seed": seed, "before": {"personal": {"a": 0.5}, "global": {"a": 0.4}}, "rounds": rounds}


def two(reference: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    return {"reference": "r", "methods": [{"name": "r", "runs": reference}, {"name": "o", "runs": other}]}


def test_equal_bytes_takes_the_last_round_within_the_budget_of_the_same_seed() -> None:
    comparison = two(
        [run(0, [0.6, 0.7, 0.8], 10, 1, None), run(1, [0.6, 0.7, 0.8], 20, 1, None)],
        [run(0, [0.61, 0.71, 0.81], 25, 1, None), run(1, [0.61, 0.71, 0.81], 25, 1, None)],
    )
    assert views.budgets(comparison, "bytes") == {0: 60.0, 1: 120.0}
    assert views.view(comparison, "r", "bytes") == {0: views.Reached(3, 0.8), 1: views.Reached(3, 0.8)}
    assert views.view(comparison, "o", "bytes") == {0: views.Reached(1, 0.61), 1: views.Reached(2, 0.71)}


def test_what_fits_no_round_stands_before_training() -> None:
    comparison = two([run(0, [0.6], 10, 1, None)], [run(0, [0.9], 11, 1, None)])
    assert views.view(comparison, "o", "bytes") == {0: views.Reached(views.BEFORE, 0.5)}


def test_a_budget_met_exactly_counts_in_spite_of_rounding() -> None:
    comparison = two([run(0, [0.6, 0.7, 0.8], 0.1, 1, None)], [run(0, [0.9], 0.3, 1, None)])
    assert 0.1 * 3 + 0.1 * 3 != 0.3 + 0.3
    assert views.view(comparison, "o", "bytes")[0].round == 1


def test_a_limit_of_ones_own() -> None:
    comparison = two([run(0, [0.6, 0.7], 10, 1, None)], [run(0, [0.6, 0.7], 10, 1, None)])
    assert views.view(comparison, "o", "bytes", limit=25.0) == {0: views.Reached(1, 0.6)}


def test_time_is_the_virtual_clock_where_there_is_one() -> None:
    without = two([run(0, [0.6, 0.7], 1, 5.0, None)], [run(0, [0.8, 0.9], 1, 8.0, None)])
    assert views.view(without, "o", "time") == {0: views.Reached(1, 0.8)}
    clock = two([run(0, [0.6, 0.7], 1, 5.0, 30.0)], [run(0, [0.8, 0.9], 1, 8.0, 30.0)])
    assert views.has_clock(clock)
    assert views.view(clock, "o", "time") == {0: views.Reached(2, 0.9)}


def test_unknown_costs_give_no_view() -> None:
    comparison = two([run(0, [0.6], 1, None, None)], [run(0, [0.8], 1, 8.0, None)])
    assert views.budgets(comparison, "time") == {}
    assert views.view(comparison, "o", "time") == {}
    other = two([run(0, [0.6], 1, 5.0, None)], [run(0, [0.8], 1, None, None)])
    assert views.view(other, "o", "time") == {}


@pytest.mark.parametrize(
    ("side", "round", "scores"),
    [
        ("personal", None, [0.7]),
        ("personal", 1, [0.6]),
        ("personal", 0, [0.5]),
        ("global", 0, [0.4]),
        ("global", 9, []),
    ],
)
def test_scores_of_a_side(side: str, round: int | None, scores: list[float]) -> None:
    assert views.side_scores(run(0, [0.6, 0.7], 1, 1, None), side, round) == scores


def test_a_method_that_never_trains_stands_before_training() -> None:
    clock = two([run(0, [0.6], 10, 1, 30.0)], [run(0, [0.5], 0, 0, None)])  # it is scored after a round, too
    assert views.view(clock, "o", "time") == {0: views.Reached(1, 0.5)}
    central = run(0, [0.9], 0, 0, None)
    central["rounds"][0]["steps"] = 12  # trained somewhere, at a cost that no client has
    for axis in ("bytes", "time"):
        assert views.view(two([run(0, [0.6], 10, 1, 30.0)], [central]), "o", axis) == {}  # type: ignore[arg-type]
    pretrained = run(0, [], 0, 0, None)
    assert views.last_round(pretrained) == views.BEFORE
    comparison = two([run(0, [0.6], 10, 1, None)], [pretrained])
    for axis in ("examples", "bytes", "time"):
        assert views.view(comparison, "o", axis) == {0: views.Reached(views.BEFORE, 0.5)}  # type: ignore[arg-type]
