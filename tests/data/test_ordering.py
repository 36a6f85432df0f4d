from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexp.client.trainer import BatchOrder


@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(-5, 5), epoch=st.integers(0, 3))
def test_every_epoch_uses_every_example_once(n: int, batch: int, seed: int, epoch: int) -> None:
    order = BatchOrder(n, batch, seed)
    first = epoch * order.steps_per_epoch
    batches = [order.indices(first + k) for k in range(order.steps_per_epoch)]
    assert sorted(index for some in batches for index in some) == list(range(n))
    assert all(len(some) == min(batch, n) for some in batches[:-1])


@given(steps=st.lists(st.integers(0, 50), min_size=1, max_size=10))
def test_any_step_can_be_asked_for_in_any_order(steps: list[int]) -> None:
    used = BatchOrder(11, 4, 3)
    assert [used.indices(step) for step in steps] == [BatchOrder(11, 4, 3).indices(step) for step in steps]


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder(50, 50, 0)
    assert order.indices(0) != order.indices(1)
    assert order.indices(0) != BatchOrder(50, 50, 1).indices(0)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BatchOrder(0, 4, 0)
    with pytest.raises(ValueError, match="negative"):
        BatchOrder(4, 4, 0).indices(-1)
