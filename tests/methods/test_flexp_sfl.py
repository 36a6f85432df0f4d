"""FlexP-SFL against the case that it reduces to, and the order of turns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexp.config import TrainConfig
from flexp.errors import TrainingError
from flexp.methods import METHODS
from flexp.methods.turns import turns
from flexp.run.settle import build_world
from tests.tiny import bert_folder, config

ONE = {"clients": {"names": ["north"], "each": [{"cut": [2, 3]}]}}
PLAIN = {"clip": None}
SGD = {"name": "sgd", "lr": 0.1}


def trained(home: Path, **settings: Any) -> Any:
    world = build_world(config(home, **settings))
    method = METHODS[world.config.method.name](world)
    losses: list[float] = []
    for number in (1, 2, 3):
        method.train_round(number, lambda step: losses.append(step.loss))
    return method, losses


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_one_client_without_alignment_is_local_training(tmp_path: Path, tuning: str) -> None:
    bert_folder(tmp_path / "model")
    common: dict[str, Any] = {
        "data": ONE,
        "model": {"tuning": tuning},
        "train": {"personal": PLAIN, "shared": PLAIN},
    }
    split, split_losses = trained(tmp_path, method={"align": {"kind": "off"}}, **common)
    local, local_losses = trained(tmp_path, method={"name": "local"}, **common)
    assert split_losses == local_losses
    whole = local.clients["north"].model.personal_state()
    parts = split.clients["north"].model.personal_state() | dict(split.server.shared.updater.parameters)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_alignment_changes_the_personal_blocks_alone(tmp_path: Path) -> None:
    """One step: λ acts on head blocks; tail and shared blocks get the task's gradient only."""
    bert_folder(tmp_path / "model")
    clients = {"clients": {"names": ["north"], "each": [{"cut": [2, 3]}]}}
    settings: dict[str, Any] = {"data": clients, "train": {"steps_per_round": 1, "personal": PLAIN, "shared": PLAIN}}

    def once(weight: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        align = {"align": {"kind": "mse", "weight": weight}}
        world = build_world(config(tmp_path, method=align, model={"base_depth": 1}, **settings))
        method: Any = METHODS["flexp-sfl"](world)
        with torch.no_grad():  # personal and shared copies of block 1 are equal at the start, so alignment is zero
            for name, value in method.server.shared.updater.parameters.items():
                if ".1." in name:
                    value.mul_(1.1)
        method.train_round(1, lambda step: None)
        return method.clients["north"].model.personal_state(), dict(method.server.shared.updater.parameters)

    (personal, shared), (aligned, shared_aligned) = once(0.0), once(1.0)
    assert all(torch.equal(value, shared_aligned[name]) for name, value in shared.items())
    moved = {name for name, value in personal.items() if not torch.equal(value, aligned[name])}
    assert moved
    assert all(".layer.0." in name or ".layer.1." in name for name in moved)


def test_a_trainers_step_that_failed_may_be_tried_again(tmp_path: Path) -> None:
    """With two micro-batches, of which the second fails: the next try is as if the first had never been."""
    bert_folder(tmp_path / "model")
    results = []
    for fails in (False, True):
        method: Any = METHODS["flexp-sfl"](build_world(config(tmp_path, data=ONE, train={"micro_batch": 2})))
        trainer = method.clients["north"]
        if fails:
            check, calls = trainer._check, []

            def failing(loss: torch.Tensor, check: Any = check, calls: list[int] = calls) -> None:
                calls.append(1)
                check(loss if len(calls) != 2 else loss * float("nan"))

            trainer._check = failing
            with pytest.raises(TrainingError, match="the loss is nan"):
                trainer.step()
            assert method.server.shared.version == trainer.steps == 0
        trainer.step()
        results.append({**trainer.model.personal_state(), **method.server.shared.updater.parameters})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_gradient_that_is_not_finite_names_its_client(tmp_path: Path) -> None:
    """The loss was finite, so nobody else had a word to say."""
    bert_folder(tmp_path / "model")
    method: Any = METHODS["flexp-sfl"](build_world(config(tmp_path, data=ONE)))
    trainer = method.clients["north"]
    trainer.step()
    next(iter(trainer.updater.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"^client north, step 2: a gradient is not finite, so nothing was applied"):
        trainer.step()
    assert trainer.steps == 1


def test_the_mean_rule_loses_no_step_of_a_run(tmp_path: Path) -> None:
    """3 rounds × 2 steps with mean_over = 4: one update of four steps, and at the end one of the last two."""
    bert_folder(tmp_path / "model")
    server = {"update": "mean", "mean_over": 4}
    method: Any = METHODS["flexp-sfl"](build_world(config(tmp_path, data=ONE, server=server)))
    for number, updates in ((1, 0), (2, 1), (3, 2)):
        method.train_round(number, lambda step: None)
        assert method.server_facts()["updates"] == updates
    assert method.server.shared._gathered.steps == 0


def test_micro_batches_change_memory_not_results(tmp_path: Path) -> None:
    """With alignment and rows of unequal length: each exchange's alignment counts by its unmasked tokens."""
    bert_folder(tmp_path / "model")
    found = []
    for micro_batch in (4, 1):
        train = {"micro_batch": micro_batch, "personal": PLAIN | SGD, "shared": PLAIN | SGD}
        align = {"align": {"kind": "mse", "weight": 5.0}}
        world = build_world(config(tmp_path, data=ONE, train=train, method=align, model={"base_depth": 1}))
        method: Any = METHODS["flexp-sfl"](world)
        with torch.no_grad():
            for value in method.server.shared.updater.parameters.values():
                value.mul_(1.1)
        steps: list[Any] = []
        method.train_round(1, steps.append)
        found.append((steps, method.clients["north"].model.personal_state()))
    (steps, whole), (small_steps, small) = found
    assert steps[0].align > 1e-4
    for step, other in zip(steps, small_steps, strict=True):
        assert (step.loss, step.align) == pytest.approx((other.loss, other.align), rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(small[name], value, rtol=1e-5, atol=1e-7)


@given(
    clients=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=5, unique=True),
    steps=st.integers(1, 4),
    order=st.sampled_from(["round-robin", "random"]),
    turn=st.sampled_from(["step", "round"]),
    seed=st.integers(0, 3),
)
def test_every_client_has_its_steps(clients: list[str], steps: int, order: Any, turn: Any, seed: int) -> None:
    settings = TrainConfig(steps_per_round=steps, order=order, turn=turn)
    found = list(turns(clients, settings, seed, 1))
    assert Counter(found) == dict.fromkeys(clients, steps)
    assert found == list(turns(clients, settings, seed, 1))
    block = len(clients) if turn == "step" else steps
    for start in range(0, len(found), block):
        assert len(set(found[start : start + block])) == (len(clients) if turn == "step" else 1)


def test_error_feedback_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """What both sides owe each other is part of the state: a run that is resumed equals one that went on."""
    bert_folder(tmp_path / "model")
    codec = {"codec": {"activation": "int4", "gradient": "int4", "error_feedback": True}}
    world = build_world(config(tmp_path, link=codec, train={"in_flight": 2}))
    one, other = (METHODS["flexp-sfl"](world) for _ in range(2))
    one.train_round(1, lambda step: None)
    state = {party: {name: value.clone() for name, value in flat.items()} for party, flat in one.state().items()}
    owed = [name for flat in state.values() for name in flat if "residuals/" in name]
    assert len(owed) == 2 * 3  # of three clients, each way
    other.load(state)
    results = []
    for method in (one, other):
        method.train_round(2, lambda step: None)
        results.append(method.state())
    for party, flat in results[0].items():
        same = [name for name in flat if not name.endswith("seconds")]
        assert all(torch.equal(flat[name], results[1][party][name]) for name in same)
