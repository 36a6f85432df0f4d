from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.comparison.statistics import Interval, interval, mean, paired, worst_decile


def test_the_interval_of_five_values_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # s² = 10 / 4, s / √5 = √0.5, t(0.975, 4) = 2.776445
    assert found is not None
    assert (found.mean, found.n) == (3.0, 5)
    assert found.half == pytest.approx(2.7764451 * math.sqrt(0.5))
    assert (found.low, found.high) == (pytest.approx(3 - 1.9632432), pytest.approx(3 + 1.9632432))


def test_two_values_have_one_degree_of_freedom() -> None:
    found = interval([0.80, 0.84])
    assert found is not None
    assert found.half == pytest.approx(12.7062047 * 0.02)  # s = 0.02·√2, divided by √2


def test_one_value_has_no_interval_and_proves_nothing() -> None:
    assert interval([0.7]) == Interval(0.7, None, 1)
    assert not Interval(0.7, None, 1).excludes_zero


@pytest.mark.parametrize("values", [[], [None], [1.0, None], [1.0, math.inf], [1.0, math.nan]])
def test_what_is_missing_leaves_no_mean(values: list[float | None]) -> None:
    assert interval(values) is None
    assert mean(values) is None
    assert worst_decile(values, higher_is_better=True) is None


def test_zero_is_excluded_on_either_side_but_not_at_the_edge() -> None:
    assert Interval(1.0, 0.9, 3).excludes_zero
    assert Interval(-1.0, 0.9, 3).excludes_zero
    assert not Interval(1.0, 1.0, 3).excludes_zero
    assert not Interval(1e-17, 0.0, 3).excludes_zero  # rounding


def test_pairs_share_their_luck() -> None:
    mine, theirs = {0: 0.9, 1: 0.7, 2: 0.8}, {0: 0.87, 1: 0.66, 2: 0.75, 3: 0.1}
    found = paired(mine, theirs, higher_is_better=True)
    assert found is not None
    assert found.n == 3  # seed 3 has no partner
    assert found.mean == pytest.approx(0.04)
    assert found.half == pytest.approx(4.3026527 * 0.01 / math.sqrt(3))
    assert found.excludes_zero


def test_positive_means_that_the_reference_is_better_also_where_lower_is() -> None:
    found = paired({0: 20.0, 1: 22.0}, {0: 25.0, 1: 28.0}, higher_is_better=False)
    assert found is not None
    assert found.mean == pytest.approx(5.5)


def test_a_failed_seed_of_a_pair_is_not_left_out() -> None:
    assert paired({0: 0.9, 1: 0.8}, {0: 0.8, 1: None}, higher_is_better=True) is None


@pytest.mark.parametrize(
    ("clients", "higher", "worst"),
    [
        ([0.5, 0.9, 0.7], True, 0.5),
        ([20.0, 90.0, 70.0], False, 90.0),
        ([float(value) for value in range(19)], True, 0.0),  # ⌊1.9⌋ = 1 client
        ([float(value) for value in range(20)], True, 0.5),  # two clients
        ([float(value) for value in range(20)], False, 18.5),
    ],
)
def test_worst_decile(clients: list[float], higher: bool, worst: float) -> None:
    assert worst_decile(clients, higher) == worst


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.floats(-1e3, 1e3))
def test_shifting_all_values_shifts_the_mean_and_keeps_the_width(values: list[float], shift: float) -> None:
    one, other = interval(values), interval([value + shift for value in values])
    assert one is not None
    assert other is not None
    assert one.half is not None
    assert other.mean == pytest.approx(one.mean + shift, abs=1e-6)
    assert other.half == pytest.approx(one.half, rel=1e-6, abs=1e-6)


def test_scores_whose_squares_are_beyond_all_floats_have_an_interval() -> None:
    small, huge = interval([1.0, 2.0, 4.0]), interval([1e300, 2e300, 4e300])
    assert small is not None
    assert huge is not None
    assert small.half is not None
    assert huge.half == pytest.approx(1e300 * small.half)
