"""What is counted without weights is what the model with its weights has, to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import ModelConfig
from flexp.cost.counting import Ledger
from flexp.cost.model_cost import STATE, _between
from flexp.models.loading import load_stage
from flexp.models.tuning import tune
from tests.planner.tools import cost_of

CASES = [(name, rank) for name in ("bert", "llama", "gpt2") for rank in (None, 4)]


def loaded(name: str, rank: int | None) -> Any:
    from flexp.config import LoraConfig

    stage = load_stage(f"arch:{name}", cost_of(name).kind)  # type: ignore[arg-type]
    tune(stage, ModelConfig(id="any", tuning="full" if rank is None else "lora", lora=LoraConfig(rank=rank or 8)))
    stage.model.train()
    return stage


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_parameters_are_the_loaded_models(name: str, rank: int | None) -> None:
    stage, shape = loaded(name, rank), cost_of(name).at(2, rank)
    for index, piece in enumerate(shape.blocks):
        values = list(stage.blocks[index].parameters())
        trained = [value for value in values if value.requires_grad]
        assert piece.parameters == sum(value.numel() for value in values)
        assert piece.weight_bytes == 4 * piece.parameters
        assert piece.trained == sum(value.numel() for value in trained)
    outside = [value for key, value in stage.model.named_parameters() if stage.block_of(key) is None]
    assert shape.head.parameters == sum(value.numel() for value in outside)
    assert shape.head.trained == sum(value.numel() for value in outside if value.requires_grad)
    total = sum(piece.parameters for piece in (*shape.blocks, shape.head))
    assert total == sum(value.numel() for value in stage.model.parameters())


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_kept_bytes_are_what_autograd_saves(name: str, rank: int | None) -> None:
    """Counted another way: by autograd's own hooks, on the model's real tensors."""
    stage = loaded(name, rank)
    ids = torch.ones(3, 10, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids.clone()}
    batch["attention_mask"][:, -1] = 0
    hidden_BTH, plan = stage.plan(batch)
    hidden_BTH = hidden_BTH.detach().requires_grad_()
    known = {
        value.untyped_storage()._cdata for value in (*stage.model.parameters(), *stage.model.buffers(), hidden_BTH)
    }
    for call in plan.calls:
        for value in torch.utils._pytree.tree_leaves((call.args, call.kwargs)):
            known |= {value.untyped_storage()._cdata} if isinstance(value, Tensor) else set()
    saved: dict[int, Any] = {}

    def pack(value: Tensor) -> Tensor:
        saved[value.untyped_storage()._cdata] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output_BTH = stage.run(hidden_BTH, plan, 0, 1)
    saved[output_BTH.untyped_storage()._cdata] = output_BTH.untyped_storage()
    expected = sum(storage.nbytes() for key, storage in saved.items() if key not in known)
    assert expected > 3 * 10 * 32 * 4
    assert cost_of(name).exactly(3, rank).blocks[0].kept_bytes == expected


@pytest.mark.parametrize(
    ("name", "rank", "checkpointing"),  # both ranks and both ways of keeping, for every model
    [(name, rank, (rank is None) == (name == "llama")) for name, rank in CASES],
)
def test_without_content_and_with_it_are_the_same(
    name: str, rank: int | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cost_of(name).exactly(2, rank, checkpointing)
    monkeypatch.setattr("flexp.cost.model_cost._COUNTED", {})  # or the first count would be taken for both
    bare = cost_of(name, without_content=True)
    assert bare.exactly(2, rank, checkpointing) == expected
    assert not bare._real


def test_a_model_that_looks_into_its_tensors_gets_real_ones() -> None:
    cost = cost_of("qwen3_moe", without_content=True)
    shape = cost.at(2)
    assert cost._real
    assert len(set(cost.kinds)) == 2
    assert shape.blocks[1].parameters != shape.blocks[0].parameters  # the dense one


def test_kept_bytes_and_operations_are_linear_in_the_examples() -> None:
    cost = cost_of("bert")
    followed, counted = cost.at(8), cost.exactly(8)
    for one, other in zip((*followed.blocks, followed.head), (*counted.blocks, counted.head), strict=True):
        assert (one.kept_bytes, one.forward_flops) == (other.kept_bytes, other.forward_flops)
        assert one.backward_extra >= other.backward_extra  # a maximum of lines lies below its chord
    assert followed.message_bytes == 8 * 10 * 32 * 4


def test_operations_by_hand() -> None:
    """Of one BERT block: four H × H products and two of H × 2H, and twice T × T × H of attention, for each token."""
    hidden, tokens = 32, 2 * 10
    products = 2 * tokens * (4 * hidden * hidden + 2 * hidden * 2 * hidden) + 2 * 2 * tokens * 10 * hidden
    piece = cost_of("bert").at(2).blocks[0]
    assert piece.forward_flops == products
    assert piece.backward_flops == 2 * products


def test_checkpointing_keeps_outputs_alone_and_computes_again() -> None:
    plain, again = (cost_of("llama").at(4, None, checkpointing).blocks[0] for checkpointing in (False, True))
    assert again.kept_bytes == 4 * 10 * 32 * 4
    assert plain.kept_bytes > 10 * again.kept_bytes
    assert again.backward_flops > plain.backward_flops


def test_server_weights() -> None:
    cost = cost_of("gpt2")
    block = cost.at(2).blocks[0]
    assert cost.server_weights(1, 3) == 2 * (block.weight_bytes + STATE["adamw"] * block.trained_bytes)


def test_between_two_sizes() -> None:
    few, more = cost_of("gpt2").at(2), cost_of("gpt2").at(16)
    assert _between(few, more, 0.0) == few
    assert _between(few.embed, replace(few.embed, kept_bytes=few.embed.kept_bytes + 10), 0.5).kept_bytes == (
        few.embed.kept_bytes + 5
    )


def test_a_ledger_counts_what_is_alive() -> None:
    weight = torch.ones(100)
    with Ledger([weight]) as ledger:
        one = weight * 2
        view = one[:10]
        assert ledger.live == 400
        two = torch.cat([one, one])
        assert ledger.mark() == (1200, 1200)
        del two
        assert ledger.mark() == (400, 1200)
        del one
        assert ledger.live == 400  # the view holds it
        del view
        assert ledger.mark() == (0, 400)
