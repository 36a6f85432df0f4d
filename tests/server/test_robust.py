"""Rules against clients that do not mean well: what each does to a step, by hand, and that it outlives a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from flexp.config import GuardConfig, OptimizerConfig, ServerConfig
from flexp.errors import ConfigError, StorageError
from flexp.gaussian import epsilon
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.run.belonging import BELONGS, SERVED, check_session
from flexp.run.status import StatusReporter
from flexp.server.checks import Bounds
from flexp.server.rules import Past, Quota, Trimmed
from flexp.server.shared import SharedBlocks
from tests.harness import World, equal, shared_weights, world


def step(here: World, client: str, number: int, fill: float = 0.1) -> None:
    here.server.answer(client, ForwardRequest(number, torch.full((2, 4, 32), 0.1), train=True, step=number))
    here.server.answer(client, BackwardRequest(number, torch.full((2, 4, 32), fill), step=number))


def joined(quota: Quota | None = None, names: str = "abc", **config: Any) -> World:
    here = world("llama", config=ServerConfig(**config))
    here.server.shared.quota = quota
    for number, name in enumerate(names):
        here.join(name, (2, 4), numbering=number + 1)
    return here


def nobody(_: str) -> None:
    pass


def test_the_trimmed_mean_leaves_out_the_ends_of_every_number() -> None:
    rule = Trimmed(1)
    for values in ([1.0, 9.0], [2.0, -50.0], [3.0, 5.0], [1e9, 7.0]):
        rule.add({"w": torch.tensor(values)}, weight=1e6)
    rule.add({"seldom": torch.tensor([4.0])}, 1.0)
    rule.add({"seldom": torch.tensor([6.0])}, 1.0)
    found = rule.take()
    assert found["w"].tolist() == [2.5, 6.0]
    assert found["seldom"].tolist() == [5.0]  # of two steps nothing can be left out
    assert rule.steps == 0


def test_steps_that_wait_stay_with_the_rule_that_gathered_them(tmp_path: Path) -> None:
    """Another one would count them, and not have them."""
    here, other = joined(update="mean", mean_over=2), joined(update="trimmed", mean_over=3)
    for number in (1, 2):
        step(here, "a", number)
        facts = {BELONGS: here.server.belongs(saved=True)}
        check_session(facts, here.server.belongs(), tmp_path)
        if number == 1:
            with pytest.raises(ConfigError, match=r"another server.update than this run now has \(mean, not trimmed\)"):
                check_session(facts, other.server.belongs(), tmp_path)
            check_session(facts, other.server.belongs(), tmp_path, SERVED)  # which trains nothing
        else:
            check_session(facts, other.server.belongs(), tmp_path)  # nothing waits


def test_nothing_may_be_left() -> None:
    with pytest.raises(ValidationError, match="leaves out 4 of mean_over = 4 steps"):
        ServerConfig(update="trimmed", mean_over=4, trim=2)


def covered(key: int = 1, **config: Any) -> SharedBlocks:
    """A tiny model's shared blocks whose updates are sums of gradients ÷ their steps, with noise from that key."""
    told = {"noise": 0.5, "guard": GuardConfig(clip=2.0)} | config
    sgd = OptimizerConfig(name="sgd", lr=1.0, clip=None)
    made = world("llama", config=ServerConfig.model_validate(told), optimizer=sgd).server.shared
    vars(made._gathered)["_key"] = key
    return made


def test_noise_covers_what_an_update_adds_up() -> None:
    """σ·C on every number of the sum, whatever came; the same for the same sum, another for another."""
    moved = []
    for key, fill, mean in ((1, 0.0, {}), (1, 0.0, {}), (2, 0.0, {}), (1, 1e-3, {}), (1, 0.0, {"update": "mean"})):
        blocks = covered(key, **mean)
        before = {name: value.detach().clone() for name, value in blocks.updater.parameters.items()}
        for number in range(4 if mean else 1):
            gradients = {name: torch.full_like(value, fill) for name, value in before.items()}
            assert blocks.add(gradients, 1e6 * (number + 1), 0.0, client="a") is (not mean or number == 3)
        after = blocks.updater.parameters
        moved.append(torch.cat([(before[name] - after[name].detach()).flatten() - fill for name in before]))
    first, same, other, more, mean = moved
    assert torch.equal(first, same)
    assert float(first.std()) == pytest.approx(0.5 * 2.0, rel=0.02)
    assert float(mean.std()) == pytest.approx(0.5 * 2.0 / 4, rel=0.02)
    assert abs(float(first.mean())) < 0.05
    for another in (other, more):
        assert abs(float(torch.corrcoef(torch.stack([first, another]))[0, 1])) < 0.05


def test_no_step_is_longer_than_the_norm_that_noise_covers() -> None:
    """And no client's steps choose which others count: norms a million times the median are scaled, not refused."""
    blocks = covered()
    assert [blocks.bounds.judge("b", 1, 1.0) for _ in range(40)] == [None] * 40
    assert blocks.bounds.judge("a", 1, 1e6) == pytest.approx(2.0 / 1e6)


@pytest.mark.parametrize(
    ("sigma", "steps", "update", "expected"),
    [  # PLDAccountant of dp-accounting 0.6, δ = 1e-5: for each update with m steps of it a GaussianDpEvent(σ ÷ 2m)
        (8.0, ["a", "b"] * 4, {}, 1.99309),
        (20.0, ["a", "a", "b", "a"] * 6, {"update": "mean", "mean_over": 4}, 3.07462),
    ],
)
def test_what_the_shared_weights_tell_of_a_client(
    sigma: float, steps: list[str], update: dict[str, Any], expected: float
) -> None:
    blocks = covered(noise=sigma, **update)
    zeros = {name: torch.zeros_like(value) for name, value in blocks.updater.parameters.items()}
    for name in steps:
        blocks.add(zeros, 1.0, 0.0, client=name)
    assert blocks.told is not None
    assert epsilon(blocks.told) == pytest.approx(expected, rel=1e-3)
    plain = joined().server.shared
    assert plain.told is None
    with pytest.raises(StorageError, match=r"trained without server\.noise"):
        blocks.load(plain.state())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"guard": {}}, "set server.guard.clip to a number"),
        ({"guard": {"clip": "median"}}, "set server.guard.clip to a number"),
        ({"guard": {"clip": 1.0, "similar": 0.0}}, "guard.similar chooses steps"),
        ({"guard": {"clip": 1.0, "max_norm": 9.0}}, "guard.max_norm chooses steps"),
        ({"guard": {"clip": 1.0}, "update": "trimmed"}, 'update = "trimmed" chooses steps'),
        ({"guard": {"clip": 1.0}, "adapters": "own"}, "nobody else sees"),
    ],
)
def test_where_noise_would_guarantee_nothing_it_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ServerConfig.model_validate({"noise": 1.0, **config})


def test_one_client_has_one_vote_on_the_median_to_which_norms_are_clipped() -> None:
    bounds = Bounds(GuardConfig(clip="median", explode=None))

    def judged(client: str, norm: float) -> float:
        return norm * (bounds.judge(client, 1, norm) or 1.0)

    assert judged("a", 5.0) == 5.0  # there are no others yet
    assert [judged("b", 3.0), judged("c", 4.0)] == [3.0, 4.0]
    for _ in range(50):
        assert judged("greedy", 1e6) == pytest.approx(4.0)  # the median of 5, 3 and 4
    assert judged("a", 100.0) == pytest.approx(4.0)  # of 3, 4 and 1e6
    again = Bounds(bounds.config)
    again.load(bounds.state())
    assert again.judge("a", 1, 100.0) == pytest.approx(4.0 / 100.0)


def test_a_step_against_the_last_ones_does_not_fit() -> None:
    past = Past(0.0, settle=2)
    ahead, back, aside = torch.tensor([1.0, 0.1]), torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert past.fits({"w": back * 0})
    assert all(past.fits({"w": ahead * scale}) for scale in (1.0, 50.0, 2.0))
    assert not past.fits({"w": back * 1e-3})
    assert past.fits({"w": aside})
    assert past.fits({"other": back})  # nothing to compare it with
    again = Past(0.0, settle=2)
    again.load(past.state())
    assert equal(again.state(), past.state())
    assert not again.fits({"w": back})


def test_a_quota_by_hand() -> None:
    heard: list[str] = []
    quota = Quota(2.0, 3, 50, heard.append)
    assert [quota.take("a") for _ in range(5)] == [True] * 5  # alone
    assert quota.take("b")
    assert not quota.take("a")  # 5 of 3 + 2 · 1
    assert not quota.take("a")
    assert len(heard) == 1
    assert "a has done 5 steps" in heard[0]
    for _ in range(3):
        assert quota.take("b")
        assert quota.take("c")
    assert [quota.take("a") for _ in range(6)] == [True] * 5 + [False]  # up to 3 + 2 · 3.5
    again = Quota(2.0, 3, 50, nobody)
    again.load(quota.state())
    assert not again.take("a")
    assert [Quota(2.0, 3, 2, nobody).take("a") for _ in range(1)] == [True]
    most = Quota(2.0, 3, 2, heard.append)
    assert [most.take("a") for _ in range(3)] == [True, True, False]  # no more than the run has, alone or not
    assert "a has done 2 steps, all that the run has" in heard[-1]
    assert "median" not in heard[-1]


def test_a_client_that_sends_ten_steps_for_one_is_answered_and_trains_with_its_quota_alone() -> None:
    here = joined(Quota(1.0, 2, None, nobody))
    for number in range(1, 4):
        for name in "ab":
            step(here, name, number)
        for each in range(10):
            step(here, "c", number * 10 - 9 + each)
    assert here.server.shared.version == 6 + 5
    assert here.server.counts()["skipped_steps"] == 25
    assert here.server.shared.skipped == {"a": 0, "b": 0, "c": 25}
    step(here, "c", 30)  # comes again: it was answered, and counts no second time
    assert here.server.counts()["skipped_steps"] == 25
    facts = StatusReporter(here.server).facts(cast(Any, SimpleNamespace(clients=[])))["clients"]
    assert [facts[name]["applied_steps"] for name in "abc"] == [3, 3, 5]
    again = joined(Quota(1.0, 2, None, nobody))
    again.server.load({name: value.clone() for name, value in here.server.state().items()})
    assert again.server.skipped == {"c": 25}


@pytest.mark.parametrize(
    "config",
    [
        {"update": "trimmed", "mean_over": 3},
        {"guard": GuardConfig(similar=0.5, settle=2)},
        {"guard": GuardConfig(clip="median")},
        {"noise": 0.1, "update": "mean", "mean_over": 4, "guard": GuardConfig(clip=0.5)},
        {"update": "mean", "mean_over": 3, "guard": GuardConfig(clip="median", similar=-0.5, settle=1)},
    ],
)
def test_they_go_on_bit_for_bit_after_a_restart(config: dict[str, Any]) -> None:
    undisturbed, stopped = joined(**config), joined(**config)
    other = joined(**config)
    if config.get("noise"):  # whose key is nobody's but the server's
        vars(undisturbed.server.shared._gathered)["_key"] = vars(stopped.server.shared._gathered)["_key"]
    for number in range(1, 6):
        for name in "abc":
            for each in (undisturbed, stopped):
                step(each, name, number, 0.1 * number if name == "a" else -0.2)
    other.server.load({name: value.clone() for name, value in stopped.server.state().items()})
    for number in range(6, 9):
        for name in "abc":
            for each in (undisturbed, other):
                step(each, name, number, 0.3)
    assert equal(shared_weights(undisturbed.server), shared_weights(other.server))
    assert equal(state(undisturbed), state(other))


def state(here: World) -> dict[str, Tensor]:
    return {name: value for name, value in here.server.state().items() if "seconds" not in name}


def test_a_free_run_has_a_quota_and_no_other_has(tmp_path: Any) -> None:
    from flexp.config import DeploymentConfig
    from flexp.config.loading import validate
    from flexp.run.server import make_conductor

    run = validate(
        {"model": {"id": "m"}, "data": {"source": "d"}, "train": {"rounds": 3, "steps_per_round": 4}}, "here"
    )
    for deployment, expected in (
        (DeploymentConfig(), 12),
        (DeploymentConfig(quota=None), None),
        (DeploymentConfig(schedule="deterministic", clients=["a"]), None),
    ):
        here = joined()
        make_conductor(here.server, run, deployment, None, nobody)
        quota = here.server.shared.quota
        assert (None if quota is None else quota._most) == expected
