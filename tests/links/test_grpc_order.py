"""Numbers of requests: twice is passed over, too late is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.errors import LinkLostError
from flexp.links.grpc.stream import GAPS_KEPT, Numbers


@given(st.lists(st.integers(1, 30), max_size=60))
def test_each_number_is_new_once_and_never_after_a_higher_one(numbers: list[int]) -> None:
    order, seen = Numbers(), set[int]()
    for number in numbers:
        if number in seen:
            assert not order.new(number)
        elif seen and number < max(seen):
            with pytest.raises(LinkLostError):
                order.new(number)
            return
        else:
            assert order.new(number)
            seen.add(number)


def test_what_is_kept_of_numbers_left_out_is_bounded() -> None:
    order = Numbers()
    for number in range(2, 2 * 10 * GAPS_KEPT, 2):
        assert order.new(number)
    assert len(order._left_out) == GAPS_KEPT
