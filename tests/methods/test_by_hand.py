"""Single rounds of the federated methods on f(θ) = ½ c (θ − a)² from θ = 0, against numbers worked out on paper."""

from __future__ import annotations

from typing import Any

import pytest

from flexp.methods.federated import spread

from .tools import average, by_hand, own

TWO = {"north": [(1.0, 1.0)], "south": [(1.0, 3.0)] * 3}  # south has three times as many examples


def test_fedavg_weighs_by_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    method = by_hand(monkeypatch, "fedavg", {}, TWO, steps=2)
    # north: 0.1, 0.19; south: 0.3, 0.57
    assert average(method) == pytest.approx(0.25 * 0.19 + 0.75 * 0.57, rel=1e-12)
    assert own(method, "north") == own(method, "south") == average(method)


def test_fedprox(monkeypatch: pytest.MonkeyPatch) -> None:
    method = by_hand(monkeypatch, "fedprox", {"mu": 2.0}, {"north": [(1.0, 1.0)]}, steps=2)
    assert average(method) == pytest.approx(0.1 + 0.1 * (0.9 - 2.0 * 0.1), rel=1e-12)


def test_fedavg_then_finetuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps in all: two rounds of two, and two of fine-tuning at the end."""
    settings: Any = {"steps": 3, "rounds": 2}
    method = by_hand(monkeypatch, "fedavg-ft", {"finetune_steps": 2}, TWO, **settings)
    one = by_hand(monkeypatch, "fedavg", {}, TWO, steps=2, rounds=2)
    before = average(method)
    assert before == average(one)
    for _ in range(2):  # asking twice changes nothing
        for name, target in (("north", 1.0), ("south", 3.0)):
            assert own(method, name) == pytest.approx(target + 0.81 * (before - target), rel=1e-12)
    assert average(method) == before


def test_pfedme_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 2, λ = 2, η = 0.25, β = 0.5: north's θ is 0.1, then 0.1 + 0.1·(0.9 − 2·0.1) = 0.17; w_i = 0.5·0.17."""
    settings = {"inner_steps": 2, "lam": 2.0, "eta": 0.25, "beta": 0.5}
    method = by_hand(monkeypatch, "pfedme", settings, TWO, steps=2)
    assert own(method, "north") == pytest.approx(0.17, rel=1e-12)
    assert own(method, "south") == pytest.approx(0.51, rel=1e-12)
    assert average(method) == pytest.approx(0.5 * (0.25 * 0.085 + 0.75 * 0.255), rel=1e-12)


@pytest.mark.parametrize("eta", [None, 0.005])
def test_pfedme_against_a_plain_loop(monkeypatch: pytest.MonkeyPatch, eta: float | None) -> None:
    lam, inner, steps, rounds, lr, beta = 15.0, 3, 8, 4, 0.02, 1.0
    method = by_hand(
        monkeypatch,
        "pfedme",
        {"inner_steps": inner, "lam": lam, "eta": eta, "beta": beta},
        TWO,
        steps=steps,
        rounds=rounds,
        lr=lr,
    )
    w, rate = 0.0, eta or 1 / lam
    theta = {"north": 0.0, "south": 0.0}
    for _ in range(rounds):
        local = {}
        for name, target in (("north", 1.0), ("south", 3.0)):
            local[name] = theta[name] = w
            for count in (3, 3, 2):
                for _ in range(count):
                    theta[name] -= lr * ((theta[name] - target) + lam * (theta[name] - local[name]))
                local[name] -= rate * lam * (local[name] - theta[name])
        w = (1 - beta) * w + beta * (0.25 * local["north"] + 0.75 * local["south"])
    assert average(method) == pytest.approx(w, rel=1e-12)
    assert {name: own(method, name) for name in theta} == pytest.approx(theta, rel=1e-12)


def test_pfedme_solves_the_envelope(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exact inner solve θ = (a + λw)/(1 + λ), and η = 1/λ makes w that θ: the proximal point."""
    method = by_hand(
        monkeypatch, "pfedme", {"inner_steps": 200, "lam": 3.0}, {"north": [(1.0, 1.0)]}, steps=200, rounds=2
    )
    assert own(method, "north") == pytest.approx(1 - 0.75**2, rel=1e-9)
    assert average(method) == pytest.approx(1 - 0.75**2, rel=1e-9)


def test_ditto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three personal steps and one of the average in a round; the pull is towards what the round began with."""
    clients = {"north": [(1.0, 1.0)]}
    method = by_hand(monkeypatch, "ditto", {"lam": 2.0, "personal_steps": 3}, clients, steps=4, rounds=2)
    assert average(method) == pytest.approx(0.19, rel=1e-12)
    value = 0.0
    for anchor in (0.0, 0.1):
        for _ in range(3):
            value -= 0.1 * ((value - 1.0) + 2.0 * (value - anchor))
    assert own(method, "north") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("variant", ["first-order", "hessian-free"])
def test_per_fedavg(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """c = 2, a = 1, α = 0.1: u = 0.2, g = −1.6; the Hessian-free step is exact on a quadratic, (1 − αc) g."""
    own_settings = {"alpha": 0.1, "variant": variant}
    steps = 3 if variant == "first-order" else 5  # one step, and one to adapt
    method = by_hand(monkeypatch, "per-fedavg", own_settings, {"north": [(2.0, 1.0)]}, steps=steps)
    expected = 0.16 if variant == "first-order" else 0.16 * 0.8
    assert average(method) == pytest.approx(expected, rel=1e-9)
    assert own(method, "north") == pytest.approx(expected + 0.1 * 2.0 * (1.0 - expected), rel=1e-9)
    assert method.account("north").gradient_evaluations == steps


def test_apfl_and_its_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of one step for two clients; α moves in the second, once v and w differ."""
    clients = {"north": [(1.0, 1.0)], "south": [(1.0, 3.0)]}
    method = by_hand(monkeypatch, "apfl", {"alpha": 0.5, "alpha_lr": 0.2}, clients, steps=2, rounds=2)
    # Round 1: w = 0.1 and 0.3, average 0.2; v = 0.05 and 0.15 (its gradient is half that of the mixture at 0).
    # Round 2, north: the mixture is 0.125, its gradient −0.875; v − w = −0.15; α = 0.5 − 0.2·(0.875·0.15).
    assert average(method) == pytest.approx(0.2 + 0.5 * (0.08 + 0.28), rel=1e-12)
    v, alpha = 0.05 + 0.1 * 0.5 * 0.875, 0.5 - 0.2 * 0.875 * 0.15
    assert own(method, "north") == pytest.approx(alpha * v + (1 - alpha) * average(method), rel=1e-12)


def test_fedrep_trains_the_head_and_then_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model θ + b: two steps of b alone with θ = 0, then one of θ with b = 0.19."""
    clients = {"north": [(1.0, 1.0)]}
    method = by_hand(monkeypatch, "fedrep", {"head_steps": 2}, clients, steps=3, bias=True)
    assert float(method.clients["north"].kept["personal"]["bias"]) == pytest.approx(0.19, rel=1e-12)
    assert average(method) == pytest.approx(0.1 * 0.81, rel=1e-12)
    assert method.server.weights.keys() == {"base.theta"}


def test_fedper_trains_both_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = {"north": [(1.0, 1.0)], "south": [(1.0, 3.0)]}
    method = by_hand(monkeypatch, "fedper", {}, clients, steps=1, rounds=2, bias=True)
    # Round 1: 0.1 and 0.3 each; the average is 0.2. Round 2: north is at 0.2 + 0.1, south at 0.2 + 0.3.
    assert float(method.clients["north"].kept["personal"]["bias"]) == pytest.approx(0.1 + 0.07, rel=1e-12)
    assert average(method) == pytest.approx(0.2 + 0.5 * (0.07 + 0.25), rel=1e-12)


def test_splitfed_v1_averages_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """θ and b have one gradient, θ + b − a: north 0.1, 0.18; south 0.3, 0.54; each on both sides."""
    method = by_hand(monkeypatch, "splitfed-v1", {}, TWO, steps=2, bias=True)
    both = method.server.weights
    assert float(both["base.theta"]) == pytest.approx(0.25 * 0.18 + 0.75 * 0.54, rel=1e-12)
    assert float(both["bias"]) == pytest.approx(0.25 * 0.18 + 0.75 * 0.54, rel=1e-12)


def test_splitfed_v2_trains_the_server_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    method = by_hand(monkeypatch, "splitfed-v2", {}, TWO, steps=2, rounds=4, bias=True)
    targets, shares, common, bias = {"north": 1.0, "south": 3.0}, {"north": 0.25, "south": 0.75}, 0.0, 0.0
    orders = [[client.name for client in method.order(number)] for number in (1, 2, 3, 4)]
    assert {tuple(order) for order in orders} == {("north", "south"), ("south", "north")}
    for order in orders:
        own = dict.fromkeys(targets, common)
        for name in order:
            for _ in range(2):
                slope = own[name] + bias - targets[name]
                own[name], bias = own[name] - 0.1 * slope, bias - 0.1 * slope
        common = sum(shares[name] * value for name, value in own.items())
    assert average(method) == pytest.approx(common, rel=1e-12)
    assert method.harness.parameters["bias"].item() == pytest.approx(bias, rel=1e-12)
    assert method.server_facts()["updates"] == 4 * 2 * 2


@pytest.mark.parametrize("every", [1, 2])
def test_splitlora_steps_together(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """The server's step is that of the mean loss of both batches, a client's that of its own."""
    method = by_hand(monkeypatch, "splitlora", {"average_every": every}, TWO, steps=2, rounds=3, bias=True)
    targets, shares, bias = {"north": 1.0, "south": 3.0}, {"north": 0.25, "south": 0.75}, 0.0
    kept, common = dict.fromkeys(targets, 0.0), 0.0
    for number in (1, 2, 3):
        for _ in range(2):
            slopes = {name: kept[name] + bias - target for name, target in targets.items()}
            kept = {name: kept[name] - 0.1 * slope for name, slope in slopes.items()}
            bias -= 0.1 * sum(slopes.values()) / 2
        if number % every == 0:
            common = sum(shares[name] * value for name, value in kept.items())
            kept = dict.fromkeys(kept, common)
    assert {name: own(method, name) for name in kept} == pytest.approx(kept, rel=1e-12)
    assert average(method) == pytest.approx(common, rel=1e-12)
    assert method.harness.parameters["bias"].item() == pytest.approx(bias, rel=1e-12)
    assert method.server_facts()["updates"] == 6


def test_steps_are_spread_evenly() -> None:
    for total in range(12):
        for rounds in range(1, 7):
            shares = [spread(total, rounds, number) for number in range(1, rounds + 1)]
            assert sum(shares) == total
            assert max(shares) - min(shares) <= 1
