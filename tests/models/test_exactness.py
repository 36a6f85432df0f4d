"""The first contract: split training is the whole model's, bit for bit, for every architecture of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexp.models.architectures import ARCHITECTURES
from flexp.models.zoo import tiny_batch
from flexp.run.verify import Outcome
from tests.models.tools import SPLIT, TEXT, both, parties, whole_of

DECODERS = [name for name in TEXT if len(ARCHITECTURES[name].tasks) == 2]
# What is padded and what is tuned do not meet: masks come with the plan, adapters with the parameters. Every
# architecture meets padding on the right in bfloat16 below, and none where it computes its blocks again.
CASES = [
    *((name, "left", tuning) for name in TEXT for tuning in ("full", "lora")),
    *((name, padding, "full") for name in ("bert", "llama") for padding in ("none", "right")),
    *(("vit", "none", tuning) for tuning in ("full", "lora")),
]


def check(outcome: Outcome) -> None:
    assert (outcome.logits, outcome.gradients, outcome.losses, outcome.weights) == (0.0, 0.0, 0.0, 0.0)
    assert outcome.tensors > 0
    assert outcome.exact


@pytest.mark.parametrize(("name", "padding", "tuning"), CASES)
def test_every_architecture(name: str, padding: str, tuning: str) -> None:
    check(both(name, padding=padding, tuning=tuning))


@pytest.mark.parametrize("name", DECODERS)
def test_classifiers_made_of_decoders(name: str) -> None:
    check(both(name, task="sequence-classification", padding="left"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "falcon-alibi", "opt", "bert", "modernbert", "vit"])
def test_eager_attention(name: str) -> None:
    check(both(name, attention="eager", padding="none" if name == "vit" else "left"))


@pytest.mark.parametrize("name", SPLIT)
def test_bfloat16(name: str) -> None:
    check(both(name, dtype="bfloat16", padding="none" if name == "vit" else "right"))


# gemma3's and modernbert's blocks differ: a block under a wrong index, or a lost mask, would show.
CUTS = [
    (name, (s, e))
    for name, blocks in (("gemma3", 4), ("modernbert", 5))
    for e in range(1, blocks + 1)
    for s in range(e)
]


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_every_legal_cut(name: str, cut: tuple[int, int]) -> None:
    check(both(name, cut=cut, padding="left"))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "opt-projected", "bert", "vit"])
@pytest.mark.parametrize("cut", [(0, 4), (0, 1), (3, 4)])
def test_cuts_at_the_ends(name: str, cut: tuple[int, int]) -> None:
    check(both(name, cut=cut))


@pytest.mark.parametrize("base_depth", [0, 1])
def test_blocks_that_client_and_server_both_hold(base_depth: int) -> None:
    check(both("gemma3", cut=(2, 3), base_depth=base_depth, padding="left"))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3_moe", "gptj", "bert", "vit"])
@pytest.mark.parametrize(("memory", "checkpointing"), [("recompute", False), ("keep", True), ("recompute", True)])
def test_computing_again_what_was_not_kept(name: str, memory: str, checkpointing: bool) -> None:
    tuning = "lora" if name in ("gemma3", "vit") else "full"
    check(both(name, memory=memory, gradient_checkpointing=checkpointing, tuning=tuning, cut=(2, 4)))


@pytest.mark.parametrize("name", SPLIT)
def test_every_architecture_knows_gradient_checkpointing(name: str) -> None:
    check(both(name, gradient_checkpointing=True, steps=1, cut=(2, 3)))


@pytest.mark.parametrize(
    ("name", "task", "extra"),
    [
        ("llama", None, "positions"),
        ("gpt2", None, "positions"),
        ("gemma3", None, "positions"),
        ("bert", None, "token_types"),
        ("gpt2", "sequence-classification", "cache"),
        ("llama", None, "cache"),
        ("bert", None, "mask of ones"),
        ("falcon", None, "boolean mask"),
    ],
)
def test_other_inputs(name: str, task: Any, extra: str) -> None:
    """Explicit positions, token types, a configuration with a cache, masks of other kinds: as the whole model."""
    reference = whole_of(name, task).model
    padding = "none" if extra == "mask of ones" else "left"
    _, split = parties(name, task=task)
    batch = tiny_batch(reference, padding=padding)  # type: ignore[arg-type]
    if extra == "positions":
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    elif extra == "token_types":
        batch["token_type_ids"] = (torch.arange(10) > 4).long().expand(3, 10)
    elif extra == "cache":
        reference.config.use_cache = split.config.use_cache = True
    elif extra == "mask of ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    else:
        batch["attention_mask"] = batch["attention_mask"].bool()
    reference.train().requires_grad_(True)
    expected, got = reference(**batch), split(**batch)
    expected.loss.backward()
    got.loss.backward()
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(expected.loss, got.loss)
    for key, value in split.stage.trainable().items():
        assert torch.equal(value.grad, reference.get_parameter(key).grad), key


@pytest.mark.parametrize("name", ["gemma3", "bert", "vit"])
def test_evaluation_is_exact_and_keeps_nothing(name: str) -> None:
    reference = whole_of(name).model
    server, split = parties(name)
    batch = tiny_batch(reference, padding="none" if name == "vit" else "right")
    with torch.no_grad():
        logits, expected = split.eval()(**batch).logits, reference(**batch).logits
    if logits.dim() == 3:  # what stands in padding does not cross
        logits, expected = (value[batch["attention_mask"].bool()] for value in (logits, expected))
    assert torch.equal(logits, expected)
    assert not server._sessions["a"].pending
    assert torch.equal(split(**batch).loss, reference(**batch).loss)  # also without no_grad
