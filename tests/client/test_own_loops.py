"""Loops of one's own that would train the server otherwise than they train the client: refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from flexp.client.pretrained import SplitModelForSequenceClassification
from flexp.errors import ConfigError, LinkError, ModelError
from flexp.server import Server
from tests.harness import world
from tests.tiny import bert_folder


def test_a_model_that_was_just_loaded_answers_as_transformers_does(tmp_path: Path) -> None:
    """In evaluation, on both sides: the server's blocks alone had dropout."""
    folder = str(bert_folder(tmp_path / "model", dropout=True))
    server = Server.from_pretrained(folder, "sequence-classification", base_depth=1)
    model = SplitModelForSequenceClassification.from_pretrained(folder, cut=(1, 3), link=server.connect("a"))
    batch = {"input_ids": torch.arange(5, 13).reshape(2, 4)}
    assert not model.training
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_another_model_in_ones_place_is_told() -> None:
    here = world("llama")
    first, batch = here.client("a", (1, 4)), here.batch()
    first.eval()(**batch)
    second = here.client("a", (2, 4))
    second.eval()(**batch)
    for mode in (True, False):
        with pytest.raises(LinkError, match="another model has joined this server as client 'a' since"):
            first.train(mode)(**batch)
    first.rejoin()  # it may come back
    first.eval()(**batch)


@pytest.mark.parametrize("remembers", [False, True])
def test_a_second_backward_through_one_forward_is_told(remembers: bool) -> None:
    here = world("llama", remembers=remembers)
    model = here.client("a", (1, 4)).train()
    found = model(**here.batch())
    found.loss.backward(retain_graph=True)
    with pytest.raises(LinkError, match=r"a second backward runs through one forward .* add the losses up"):
        found.logits.pow(2).mean().backward()


def test_a_past_that_is_not_kept_is_told() -> None:
    here = world("llama")
    model = here.client("a", (1, 4)).eval()
    with pytest.raises(ModelError, match=r"use_cache=True was asked for.* write with model.generate"):
        model(input_ids=here.batch()["input_ids"], use_cache=True)
    assert model(input_ids=here.batch()["input_ids"], use_cache=False).past_key_values is None


def test_sums_of_accelerate_are_told_or_counted() -> None:
    here = world("llama")
    model = here.client("a", (1, 4)).train()
    told = here.client("b", (1, 4), accumulation=2).train()
    try:
        Accelerator(cpu=True, gradient_accumulation_steps=2)
        GradientState()._set_sync_gradients(False)
        with pytest.raises(ConfigError, match="accelerate adds up gradients of several batches"):
            model(**here.batch())
        told(**here.batch()).loss.backward()
        assert told.steps.done == 0
    finally:
        GradientState._reset_state()
    model(**here.batch()).loss.backward()
    assert model.steps.done == 1


def test_writing_leaves_the_mode_as_it_was() -> None:
    here = world("llama")
    model = here.client("a", (1, 4))
    for mode in (True, False):
        model.train(mode)
        model.generate(here.batch()["input_ids"], max_new_tokens=2)
        assert model.training is mode
