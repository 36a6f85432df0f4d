"""The closed form is scikit-learn's, leaving one out is doing without it, and a client's own head is by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from flexp.client.closed_form import GAMMAS, TEMPERATURES, Discriminant, LinearHead, Statistics, personal_means
from flexp.client.personal_head import Common, choose, log_prior, personal_head

CLASSES, WIDTH = 4, 6


def examples(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    means = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    bend = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    noise = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return means[labels] + noise @ bend + 3, labels


class Shrunk:
    """What scikit-learn asks for the covariance of each class, of which it takes the mean."""

    def __init__(self, gamma: float, target: float, scale: float) -> None:
        self.gamma, self.target, self.scale = gamma, target, scale

    def fit(self, rows: Any) -> Shrunk:
        spread = np.cov(rows.T, bias=True) * self.scale
        self.covariance_ = (1 - self.gamma) * spread + self.gamma * self.target * np.eye(rows.shape[1])
        return self


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_it_is_scikit_learns(gamma: float) -> None:
    x, y = examples()
    target = float(np.trace(np.cov(x.numpy().T, bias=True))) / WIDTH
    scale = len(y) / (len(y) - CLASSES)  # scikit-learn divides the scatter by N, not by the degrees of freedom
    theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk(gamma, target, scale))
    theirs.fit(x.numpy(), y.numpy())
    head = Discriminant(Statistics.of(x, y, CLASSES)).head(gamma, 0.5)
    assert np.allclose(head.weight, 0.5 * theirs.coef_, atol=1e-9)
    assert np.allclose(head.bias, 0.5 * (theirs.intercept_ - np.log(theirs.priors_)), atol=1e-9)


def test_sums_of_parties_are_the_sums_of_all_and_cross_as_triangles() -> None:
    x, y = examples()
    parts = [Statistics.of(x[i::3], y[i::3], CLASSES).tensors() for i in range(3)]
    assert parts[0]["gram"].shape == (WIDTH * (WIDTH + 1) // 2,)
    added = Statistics.from_tensors({name: sum(part[name] for part in parts) for name in parts[0]})  # type: ignore[misc]
    whole = Statistics.of(x, y, CLASSES)
    for name in ("counts", "sums", "square", "gram"):
        assert torch.allclose(getattr(added, name), getattr(whole, name), rtol=1e-6, atol=1e-4), name


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("gamma", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("kappa", [None, 0.5, 8.0])
def test_leaving_one_out_is_doing_without_it(gamma: float, gram: bool, kappa: float | None) -> None:
    x, y = examples()
    mine = slice(0, 12)
    total, own = Statistics.of(x, y, CLASSES, gram), Statistics.of(x[mine], y[mine], CLASSES, gram)
    given = {} if kappa is None else {"own": own, "kappa": kappa}
    logits, possible = Discriminant(total).left_out(x[mine], y[mine], gamma, **given)  # type: ignore[arg-type]
    assert possible.all()
    for index in range(12):
        rest = torch.arange(len(y)) != index
        found = Discriminant(Statistics.of(x[rest], y[rest], CLASSES, gram))
        means = None
        if kappa is not None:
            left = Statistics.of(x[mine][rest[mine]], y[mine][rest[mine]], CLASSES, gram)
            means = personal_means(left, found.means, kappa)
        expected = found.head(gamma if gram else 1.0, 1.0, means)(x[index])
        if gram or gamma == 1.0:
            assert torch.allclose(logits[index], expected, atol=1e-8), index


def test_shrinkage_and_temperature_have_the_smallest_loss_left_out() -> None:
    x, y = examples()
    found = Discriminant(Statistics.of(x, y, CLASSES))
    gamma, temperature = found.chosen(found.losses(x[:10], y[:10]) + found.losses(x[10:], y[10:]))

    def by_hand(gamma: float, temperature: float) -> float:
        cost = 0.0
        for index in range(len(y)):
            rest = torch.arange(len(y)) != index
            logits = Discriminant(Statistics.of(x[rest], y[rest], CLASSES)).head(gamma, temperature)(x[index])
            cost += float(torch.nn.functional.cross_entropy(logits, y[index]))
        return cost

    right = min((by_hand(g, float(t)), g, float(t)) for g in GAMMAS for t in TEMPERATURES)
    assert (gamma, temperature) == right[1:]


def test_classes_without_examples_are_never_answered() -> None:
    x, y = examples()
    head = Discriminant(Statistics.of(x, y, CLASSES + 2)).head(0.5, 1.0)
    assert bool(torch.isfinite(head.bias).all())
    assert int(head(x).argmax(1).max()) < CLASSES
    alone = Discriminant(Statistics.of(x[:3], y[:3], CLASSES))  # one example each: nothing within classes
    assert alone.gammas == (1.0,)
    assert alone.chosen(alone.losses(x[:3], y[:3])) == (1.0, 1.0)
    assert alone.head(1.0, 1.0)(x[:3]).argmax(1).tolist() == [0, 1, 2]


def test_the_prior_finds_the_skew() -> None:
    everybody = torch.full((CLASSES,), 100.0, dtype=torch.float64)
    alike, a = log_prior(torch.full((CLASSES,), 25.0, dtype=torch.float64), everybody)
    assert a > 1e4
    assert torch.allclose(alike.exp(), torch.full((CLASSES,), 0.25, dtype=torch.float64), atol=1e-3)
    skewed, a = log_prior(torch.tensor([90.0, 10.0, 0.0, 0.0], dtype=torch.float64), everybody)
    assert a < 5
    assert skewed[0] > -0.2
    assert torch.isclose(skewed.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_client_that_is_like_all_gets_everybodys_head_and_an_odd_one_its_own() -> None:
    x, y = examples(200)
    total = Statistics.of(x, y, CLASSES)
    common = Common(total, 0.5, 0.5)
    own = Statistics.of(x[:40], y[:40], CLASSES)
    head = personal_head(common, own, x[:40], y[:40])
    assert float((head(x).argmax(1) == common.head()(x).argmax(1)).double().mean()) > 0.95
    odd = x.clone()
    odd[:40] = x[:40].roll(1, 0)  # one client whose classes mean what others' next ones do
    total = Statistics.of(odd, y, CLASSES)
    own, common = Statistics.of(odd[:40], y[:40], CLASSES), Common(total, 0.5, 0.5)
    head = personal_head(common, own, odd[:40], y[:40])
    fresh, labels = examples(80, seed=1)
    fresh = fresh.roll(1, 0)
    assert float((head(fresh).argmax(1) == labels).double().mean()) > 0.8
    assert float((common.head()(fresh).argmax(1) == labels).double().mean()) < 0.2


def test_a_client_that_means_something_else_goes_its_own_way_from_the_beginning() -> None:
    x, y = examples(240)
    odd = torch.cat([(y[:60] + 1) % CLASSES, *[(y[60 * i : 60 * (i + 1)] + 1 + i) % CLASSES for i in range(1, 4)]])
    common = Common(Statistics.of(x, odd, CLASSES), 0.5, 0.5)  # four clients, four meanings: the means are alike
    fresh, labels = examples(80, seed=1)
    own = Statistics.of(x[:60], odd[:60], CLASSES)
    for head in (common.begin(x[:60], odd[:60]), common.personal(own, x[:60], odd[:60])):
        found = Discriminant(own)
        alone = found.head(*found.chosen(found.losses(x[:60], odd[:60])))
        assert torch.equal(head.weight, alone.weight)
        assert float((head(fresh).argmax(1) == (labels + 1) % CLASSES).double().mean()) > 0.9
    found = Discriminant(Statistics.of(x, y, CLASSES))
    same = Common(found.total, *found.chosen(found.losses(x, y)))
    assert torch.equal(same.begin(x[:20], y[:20]).weight, same.head().weight)  # who is like all begins like all


def test_features_that_know_the_labels_by_heart_are_no_evidence() -> None:
    """After training a client's own features tell its examples' labels, and nobody else's."""

    def at_client(number: int, known: float) -> tuple[Tensor, Tensor]:
        x, y = examples(48, seed=number)
        mark = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(50 + number), dtype=torch.float64)
        return torch.cat([x, known * mark[y]], dim=1), y  # what was learned by heart has channels of its own

    parts = [at_client(number, 6.0) for number in range(4)]
    total = Statistics.of(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), CLASSES)
    found = Discriminant(total)
    common = Common(total, *found.chosen(found.losses(*parts[0])))
    x, y = parts[0]
    head = common.personal(Statistics.of(x, y, CLASSES), x, y)
    fresh, labels = at_client(0, 0.0)
    assert torch.nn.functional.cross_entropy(head(fresh), labels) < 0.7  # its own sums alone: 70; guessing: 1.4


def test_a_closed_form_is_no_surer_than_what_was_trained_on_the_same_features() -> None:
    x, y = examples(60)
    own = Statistics.of(x, y, CLASSES)
    common = Common(own, 0.5, 0.5)
    sure, modest = Discriminant(own).head(0.1, 5.0), Discriminant(own).head(0.5, 0.1)
    error = torch.nn.functional.cross_entropy
    assert error(sure(x), y) < error(modest(x), y)
    found = common.no_surer(sure, modest, x, y)
    torch.testing.assert_close(error(found(x), y), error(modest(x), y))
    assert torch.equal(found(x).argmax(1), sure(x).argmax(1))
    assert common.no_surer(modest, sure, x, y) is modest


class Opposite(Common):
    """Whose closed form says the opposite of what it should."""

    def personal(self, own: Statistics, features_NH: Tensor, labels_N: Tensor) -> LinearHead:
        return Discriminant(self.total).head(self.gamma, -self.temperature)


@pytest.mark.parametrize("good", [True, False])
def test_what_answers_is_chosen_on_examples_that_it_has_not_seen(good: bool) -> None:
    x, y = examples(60)
    own = Statistics.of(x, y, CLASSES)
    trained = Discriminant(own).head(0.3, 1.0) if good else drawn()
    common, seen = (Opposite if good else Common)(own, 0.5, 0.5), []

    def retrain(head: LinearHead, some: Tensor, labels: Tensor) -> LinearHead:
        seen.append(len(labels))
        return Discriminant(Statistics.of(some, labels, CLASSES)).head(0.3, 1.0) if good else trained

    head, choice = choose(common, own, x, y, trained, retrain)
    assert seen[:4] == [45] * 4
    assert choice == ("trained" if good else "closed-form")
    assert (head is trained) == good


def test_what_was_averaged_with_clients_who_differ_is_judged_itself() -> None:
    """One that this client would train is better than the average that it has, which its own examples tell."""
    x, y = examples(60)
    own, average, seen = Statistics.of(x, y, CLASSES), drawn(), []

    def retrain(head: LinearHead, some: Tensor, labels: Tensor) -> LinearHead:
        seen.append(len(labels))
        return Discriminant(Statistics.of(some, labels, CLASSES)).head(0.3, 1.0)

    common = Common(own, 0.5, 0.5)
    head, choice = choose(common, own, x, y, average, retrain)
    assert (choice, seen) == ("closed-form", [45] * 4 + [60])
    error = torch.nn.functional.cross_entropy
    # No surer than what it would train, instead of as unsure as an average that knows nothing of it.
    assert error(head(x), y) >= error(Discriminant(own).head(0.3, 1.0)(x), y) - 1e-9
    assert error(head(x), y) < 0.5 * error(average(x), y)


def drawn() -> LinearHead:
    """One that knows nothing."""
    weight = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return LinearHead(weight, torch.zeros(CLASSES, dtype=torch.float64))
