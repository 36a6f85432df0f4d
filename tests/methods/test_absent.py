"""Clients that cannot take part: the others train as if they were not there, and they are scored all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.methods import METHODS

from .tools import equal, trained

CLOCKS = ("seconds",)
PAIR = {"clients": {"names": ["north", "south"], "each": [{"cut": [1, 4]}, {"cut": [2, 4]}]}}
TRIO = {"clients": {"names": ["north", "south", "west"], "each": [{"cut": [1, 4]}, {"cut": [2, 4]}, {"cut": [3, 4]}]}}
SETTINGS: dict[str, Any] = {"rounds": 2, "train": {"steps_per_round": 2}}


def logits(method: Any, client: str) -> torch.Tensor:
    task, clients = method.world.federation.task, method.world.federation.clients
    batch = task.collate(clients[0].test[:3])
    batch.pop("labels")
    found: torch.Tensor = method.personal(client)(batch).logits
    return found


AVERAGED = ("fedavg", "fedavg-ft", "fedprox", "pfedme", "ditto", "per-fedavg", "apfl")
"""Methods whose average absent clients are scored with."""


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pretrained"])
def test_the_others_train_as_without_them(home: Path, name: str) -> None:
    method = trained(home, name, data=TRIO, absent=["west"], **SETTINGS)
    alone = trained(home, name, data=PAIR, **SETTINGS)
    assert {step.client for step in method.seen} == (set() if name == "closed-form" else {"north", "south"})
    state, expected = method.state(), alone.state()
    assert expected.keys() <= state.keys()
    for party, tensors in expected.items():
        kept = {key: value for key, value in tensors.items() if not any(word in key for word in CLOCKS)}
        assert kept
        assert equal(kept, {key: value for key, value in state[party].items() if key in kept})
    account = method.account("west")
    assert (account.gradient_evaluations, account.training.bytes_up, account.training.bytes_down) == (0, 0, 0)
    assert account.client_seconds == account.server_seconds == 0.0
    assert torch.isfinite(logits(method, "west")).all()
    if name in AVERAGED:
        weights = method.server.weights
        assert equal(method.harness.take(), weights)
        assert method.account("west").evaluation.bytes_down == 4 * sum(value.numel() for value in weights.values())
        assert method.account("west").personal_parameters == 0


def test_what_is_personal_is_the_pretrained_models(home: Path) -> None:
    method = trained(home, "fedper", data=TRIO, absent=["west"], own={"last_blocks": 1}, **SETTINGS)
    fresh = trained(home, "fedper", data=TRIO, own={"last_blocks": 1}, rounds=1)
    start = {name: fresh.world.source.model.get_parameter(name) for name in fresh.clients["west"].kept["personal"]}
    logits(method, "west")
    assert equal(method.harness.take(), {**start, **method.server.weights})


def test_without_an_average_they_have_the_pretrained_model(home: Path) -> None:
    method = trained(home, "local", data=TRIO, absent=["west"], **SETTINGS)
    before = trained(home, "pretrained", data=TRIO, rounds=1)
    assert torch.equal(logits(method, "west"), logits(before, "west"))
    assert not torch.equal(logits(method, "north"), logits(before, "north"))


@pytest.mark.parametrize("name", ["splitfed-v1", "splitfed-v2", "splitlora", "split-fedavg", "splitft"])
def test_split_methods_give_them_the_average(home: Path, name: str) -> None:
    """Where all hold the same, an absent client's model is everybody's."""
    data = {"clients": {"names": ["north", "south", "west"], "each": [{"cut": [1, 4]}]}}
    method = trained(home, name, data=data, absent=["west"], **SETTINGS)
    assert torch.equal(logits(method, "west"), logits(method, "north"))
    before = trained(home, "pretrained", data=data, rounds=1)
    assert not torch.equal(logits(method, "west"), logits(before, "west"))


@pytest.mark.parametrize("name", ["fedavg", "splitfed-v2", "splitlora", "split-fedavg", "flexp-sfl", "local"])
def test_nobody_may_be_left(home: Path, name: str) -> None:
    method = trained(home, name, data=TRIO, absent=["north", "south", "west"], **SETTINGS)
    assert method.seen == []
    before = trained(home, "pretrained", data=TRIO, rounds=1)
    assert torch.equal(logits(method, "west"), logits(before, "west"))
