"""The closed form of a number is scikit-learn's ridge, leaving one out is doing without it, and a client's own is by
hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as Theirs
from torch import Tensor

from flexp.client.closed_form import LinearHead, Statistics
from flexp.client.personal_head import choose
from flexp.client.ridge import STRENGTHS, CommonRidge, Ridge, sums_of_numbers

WIDTH = 6


def examples(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64) + 2
    slope = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    return x, x @ slope + 5 + 0.3 * torch.randn(count, generator=draw, dtype=torch.float64)


def plain(x: Tensor, y: Tensor, penalty: float) -> Theirs:
    return Theirs(alpha=penalty).fit(x.numpy(), y.numpy())


def penalty_of(x: Tensor, strength: float) -> float:
    return strength * float((x - x.mean(0)).square().sum()) / WIDTH


@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_it_is_scikit_learns_and_leaves_one_out_exactly(strength: float) -> None:
    x, y = examples()
    parts = [sums_of_numbers(x[i::3], y[i::3], True).tensors() for i in range(3)]
    total = Statistics.from_tensors({name: sum(part[name].double() for part in parts) for name in parts[0]})  # type: ignore[misc]
    found = Ridge(total)
    theirs, head = plain(x, y, penalty_of(x, strength)), found.head(strength)
    assert np.allclose(head.weight[0], theirs.coef_, atol=1e-4)
    assert np.allclose(head.bias, theirs.intercept_, atol=1e-4)
    found = Ridge(sums_of_numbers(x, y, True))
    for index, far in enumerate(found.left_out(x, y, strength)[:5].tolist()):
        rest = torch.arange(len(y)) != index
        without = plain(x[rest], y[rest], penalty_of(x, strength)).predict(x[index : index + 1].numpy())[0]
        assert far == pytest.approx(float(y[index]) - without, abs=1e-8)


def test_a_client_with_a_level_of_its_own_gets_it_and_one_that_is_alike_stays() -> None:
    x, y = examples(160)
    odd = y.clone()
    odd[:40] += 4  # one client that rates higher
    fresh, right = examples(60, seed=1)
    for mine, shift in ((slice(0, 40), 4.0), (slice(40, 80), 0.0)):
        total, own = sums_of_numbers(x, odd, True), sums_of_numbers(x[mine], odd[mine], True)
        losses = Ridge(total).losses(x, odd)
        common = CommonRidge(total, float(STRENGTHS[int(losses.argmin())]))
        errors = [
            float((head(fresh)[:, 0] - right - shift).square().mean())
            for head in (common.head(), common.personal(own, x[mine], odd[mine]))
        ]
        assert errors[1] < 0.25
        assert errors[1] < errors[0]


def test_a_client_that_rates_the_other_way_round_goes_its_own_way() -> None:
    x, y = examples(160)
    odd = torch.cat([-y[:80], y[80:]])
    common = CommonRidge(sums_of_numbers(x, odd, True), 1e-2)
    fresh, right = examples(60, seed=1)
    own = sums_of_numbers(x[:40], odd[:40], True)
    for head in (common.begin(x[:40], odd[:40]), common.personal(own, x[:40], odd[:40])):
        assert float((head(fresh)[:, 0] + right).square().mean()) < 0.25


def test_what_answers_is_chosen_for_numbers_as_well() -> None:
    x, y = examples(60)
    total = sums_of_numbers(x, y, True)
    trained = LinearHead(torch.zeros(1, WIDTH, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    head, choice = choose(CommonRidge(total, 1e-3), total, x, y, trained, lambda *_: trained)
    assert choice == "closed-form"
    assert float((head(x)[:, 0] - y).square().mean()) < 0.2


def test_without_a_gram_matrix_the_mean_is_what_is_known() -> None:
    x, y = examples()
    head = Ridge(sums_of_numbers(x, y, False)).head(1.0)
    assert torch.allclose(head(x)[:, 0], y.mean().expand(len(y)))
