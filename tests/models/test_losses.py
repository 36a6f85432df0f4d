"""A language model's loss in pieces: transformers' number and gradient, bit for bit, in less memory."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from flexp.cost.model_cost import model_cost
from flexp.models import losses
from flexp.models.loading import load_stage
from flexp.models.stage import Stage
from flexp.models.zoo import save_tiny, tiny_batch, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 41, torch.tensor(41)])
@pytest.mark.parametrize("shape", [(2, 37, 301), (1, 300, 50), (3, 2, 7000)])
def test_bits(shape: tuple[int, int, int], items: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ignored labels, a step's items counted, labels that are shifted already, and without any gradient."""
    monkeypatch.setattr(losses, "PIECE", 4096)
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(shape, dtype=dtype), torch.randint(0, shape[-1], shape[:2])
    labels[:, : shape[1] // 3] = -100
    for shifted in (None, labels.roll(-1, 1)):
        found = []
        for loss in (ForCausalLMLoss, losses.next_token_loss):
            given = logits.clone().requires_grad_()
            value = loss(given, labels, shape[-1], items, shift_labels=shifted)
            (0.37 * value).backward()
            found.append((value.detach(), given.grad))
            assert torch.equal(value.detach(), loss(logits, labels, shape[-1], items, shift_labels=shifted))
        (value, grad), (other, other_grad) = found
        assert torch.isfinite(value)
        assert torch.equal(value, other)
        assert torch.equal(grad, other_grad)


def test_what_is_differentiated_twice_and_other_words_for_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gradients are inverted; of logits that are a part of larger ones; 0 may stand for no label."""
    monkeypatch.setattr(losses, "PIECE", 1024)
    torch.manual_seed(0)
    whole, labels = torch.randn(2, 40, 301, dtype=torch.bfloat16), torch.randint(0, 3, (2, 37))
    for ignored in (-100, 0):
        found = []
        for loss in (ForCausalLMLoss, losses.next_token_loss):
            given = whole.clone().requires_grad_()
            value = loss(given[:, :37].float().cos(), labels, 301, 41, ignored)
            (grad,) = torch.autograd.grad(value, given, create_graph=True)
            found.append((value, grad, *torch.autograd.grad(grad.square().sum(), given)))
            loss(given[:, :37], labels, 301, 41, ignored).backward()
            found[-1] += (given.grad,)
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        assert found[0][0] > 0


def test_a_loaded_model_has_it_and_plans_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path)
    stage = load_stage(str(folder), "causal-lm")
    batch = tiny_batch(stage.model, batch=8, length=64)
    batch["labels"] = batch["input_ids"]
    vocabulary = stage.model.config.vocab_size
    at_once, before = stage.model(**batch).loss, extra(folder, 64)
    monkeypatch.setattr(losses, "PIECE", 8 * vocabulary)
    assert torch.equal(at_once, stage.model(**batch).loss)
    in_pieces = extra(folder, 65)
    assert before - in_pieces > 1.8 * 8 * 64 * vocabulary * 4  # a copy of the logits forwards, one backwards


def extra(folder: Path, length: int) -> int:
    """Bytes that a plan counts at the worst moments of a head with its loss, beside what it keeps."""
    head = model_cost(str(folder), "causal-lm", length=length).exactly(8).head
    return head.forward_extra + head.backward_extra


def test_a_model_that_is_given_away_takes_nothing_of_it_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled it needs no FlexP, and computes the same; wrapped again, or copied, it has its loss in pieces."""
    model = tiny_model("llama", task="causal-lm")
    Stage.whole(model)
    assert model.loss_function is losses.IN_PIECES
    written = pickle.dumps(model)
    assert b"flexp" not in written
    loaded = pickle.loads(written)
    batch = tiny_batch(model)
    batch["labels"] = batch["input_ids"]
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    for other in (copy.deepcopy(model), Stage.whole(loaded).model):
        assert other.loss_function is losses.IN_PIECES


def test_no_line_is_drawn_from_one_way_to_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path)
    cost = model_cost(str(folder), "causal-lm", length=64)
    words = load_stage(str(folder), "causal-lm").model.config.vocab_size
    monkeypatch.setattr(losses, "PIECE", 8 * 64 * words)  # of 9 examples the loss comes in pieces
    for size in (1, 2, 8, 9, 12, 16):
        line, true = (
            each.head.forward_extra + each.head.backward_extra for each in (cost.at(size), cost.exactly(size))
        )
        assert line == pytest.approx(true, rel=0.01)
    for size in (1, 8, 9):
        assert cost.at(size).head == cost.exactly(size).head
