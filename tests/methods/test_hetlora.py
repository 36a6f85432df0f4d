"""HetLoRA: a client of rank r trains as one of rank r, and averages are those of the padded adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.methods.hetlora import BySparsity
from flexp.methods.ranks import of_rank

from .tools import equal, make, trained

LORA = {"tuning": "lora"}


def test_equal_ranks_are_fedavg_with_lora(home: Path) -> None:
    plain = trained(home, "fedavg", model={**LORA, "lora": {"rank": 4}})
    for ranks, settings in (([4], {}), (None, {"model": {"lora": {"rank": 4}}})):
        method = trained(home, "hetlora", own={"weighting": "examples"}, ranks=ranks, **settings)
        assert equal(method.server.weights, plain.server.weights)
        assert method.account("north").training == plain.account("north").training


def test_a_client_of_a_lower_rank_trains_as_such(home: Path) -> None:
    """Rank 2 of 8 at scaling 16/8, against FedAvg of rank 2 at scaling 4/2, to the rounding of sums with zeros."""
    settings: dict[str, Any] = {"absent": ["south", "west"], "rounds": 1, "train": {"steps_per_round": 5}}
    method = trained(home, "hetlora", ranks=[2, 8, 8], **settings)
    plain = trained(home, "fedavg", model={**LORA, "lora": {"rank": 2, "alpha": 4.0}}, **settings)
    assert [step.loss for step in method.seen] == pytest.approx([step.loss for step in plain.seen], rel=1e-5)
    moved = 0
    for name, value in plain.server.weights.items():
        padded = method.server.weights[name]
        torch.testing.assert_close(of_rank(name, padded, 2), value, rtol=1e-4, atol=1e-6)
        rest = padded[2:] if "lora_A" in name else padded[:, 2:] if "lora_B" in name else padded[:0]
        assert int(rest.count_nonzero()) == 0
        moved += int("lora_B" in name and bool(value.count_nonzero()))
    assert moved > 10


def test_a_low_rank_gets_sends_and_is_scored_with_its_part(home: Path) -> None:
    method = trained(home, "hetlora", ranks=[2, 8, 4])
    shapes = {name: value.shape for name, value in method.server.weights.items()}
    adapters = sum(shape.numel() for name, shape in shapes.items() if "lora_" in name)
    head = sum(shape.numel() for name, shape in shapes.items() if "lora_" not in name)
    for client, rank in {"north": 2, "south": 8, "west": 4}.items():
        traffic = method.account(client).training
        assert traffic.bytes_up == traffic.bytes_down == 2 * 4 * (adapters * rank // 8 + head)
        own = method.personal_weights(method.clients[client])
        for name, value in own.items():
            assert value.shape == shapes[name]
            full = method.server.weights[name]
            assert torch.equal(of_rank(name, value, rank), of_rank(name, full, rank))
            assert (int(value.count_nonzero()) == int(full.count_nonzero())) == (rank == 8 or "lora_" not in name)


def test_adapters_are_weighted_by_sparsity_by_hand() -> None:
    """‖B·A‖ is 5 and 15: a quarter and three quarters for the adapter; the head by examples, a half each."""
    a, b = "x.lora_A.w", "x.lora_B.w"
    zeros = {a: torch.zeros(1, 2), b: torch.zeros(1, 1), "head": torch.zeros(1)}
    server = BySparsity(dict(zeros))
    server.receive({a: torch.tensor([[3.0, 4.0]]), b: torch.tensor([[1.0]]), "head": torch.tensor([1.0])}, 0.5)
    server.receive({a: torch.tensor([[3.0, 4.0]]), b: torch.tensor([[3.0]]), "head": torch.tensor([3.0])}, 0.5)
    server.finish()
    assert server.weights[a].tolist() == [[3.0, 4.0]]
    assert server.weights[b].tolist() == [[0.25 * 1.0 + 0.75 * 3.0]]
    assert server.weights["head"].tolist() == [2.0]
    server.receive({**zeros, a: torch.tensor([[4.0, 0.0]])}, 0.25)  # products that are all zero: by examples
    server.receive(zeros, 0.75)
    server.finish()
    assert server.weights[a].tolist() == [[1.0, 0.0]]


def test_sparsity_weighs_otherwise_than_examples(home: Path) -> None:
    settings: dict[str, Any] = {"rounds": 2}
    plain = trained(home, "hetlora", own={"weighting": "examples"}, ranks=[2, 8], **settings)
    other = trained(home, "hetlora", ranks=[2, 8], **settings)
    assert not equal(plain.server.weights, other.server.weights)


def test_the_scaling_is_that_of_the_largest_rank(home: Path) -> None:
    method = make(home, "hetlora", ranks=[2, 4])
    layers = [module for module in method.harness.stage.model.modules() if hasattr(module, "lora_A")]
    assert layers
    assert {layer.scaling["default"] for layer in layers} == {16.0 / 4}
