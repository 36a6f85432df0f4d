"""Padding with zeros: exact for every rank, and averaged over those who hold something."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexp.methods.ranks import average, fit, of_rank

A, B = "block.lora_A.default.weight", "block.lora_B.default.weight"


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, with which sums in any order are exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(
    rank=st.integers(1, 6),
    extra=st.integers(0, 6),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_padded_adapter_is_the_same_function(rank: int, extra: int, width: int, out: int, seed: int) -> None:
    down, up = whole_numbers(rank, width, seed=seed), whole_numbers(out, rank, seed=seed + 1)
    full_down, full_up = fit(down, (rank + extra, width)), fit(up, (out, rank + extra))
    assert torch.equal(full_up @ full_down, up @ down)
    assert torch.equal(of_rank(A, full_down, rank), down)
    assert torch.equal(of_rank(B, full_up, rank), up)
    assert torch.equal(fit(full_down, down.shape), down)
    assert int(full_down[rank:].count_nonzero()) == int(full_up[:, rank:].count_nonzero()) == 0


def test_a_head_has_no_rank() -> None:
    head = whole_numbers(3, 5)
    assert of_rank("classifier.weight", head, 1) is head
    assert fit(head, (3, 5)) is head


def test_two_clients_by_hand() -> None:
    """North has 1 example and rank 1, south 3 and rank 2; the bias is south's alone."""
    parts = {
        "north": {A: torch.tensor([[4.0, 8.0]]), B: torch.tensor([[4.0]])},
        "south": {A: torch.tensor([[8.0, 0.0], [4.0, 12.0]]), B: torch.tensor([[0.0, 8.0]]), "bias": torch.ones(1)},
    }
    means = average(parts, {"north": 1, "south": 3})
    assert means[A].tolist() == [[7.0, 2.0], [3.0, 9.0]]
    assert means[B].tolist() == [[1.0, 6.0]]
    assert means["bias"].tolist() == [1.0]


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_equals_average_to_equals(weights: list[int], seed: int) -> None:
    value = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    parts = {str(index): {"w": value.clone()} for index in range(len(weights))}
    mean = average(parts, {str(index): count for index, count in enumerate(weights)})["w"]
    assert mean.dtype == value.dtype
    assert torch.equal(mean, value)


def test_nobody_averages_to_nothing() -> None:
    assert average({}, {}) == {}


def test_other_dimensions_do_not_fit() -> None:
    with pytest.raises(ValueError, match="zip"):
        fit(torch.zeros(2, 3), (2,))
