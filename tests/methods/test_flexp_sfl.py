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
from flexp.experiments.setup import build_world
from flexp.methods import METHODS
from flexp.methods.turns import turns

from ..experiments.tiny import bert_folder, config

ONE = {"clients": {"names": ["north"], "cuts": [[2, 3]]}}
PLAIN = {"clip": None}


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
    clients = {"clients": {"names": ["north"], "cuts": [[2, 3]]}}
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
