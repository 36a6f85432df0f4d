"""Padding and rows that no loss reads do not cross, and what is trained is the whole model's, bit for bit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import AlignConfig, CodecConfig
from flexp.errors import LinkError
from flexp.kinds import KINDS
from flexp.links.base import Link
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest
from flexp.links.opening import loopback
from flexp.links.packing import Places, arrived, sent, without_padding
from flexp.models.batches import Pooling
from tests.harness import RecordingLink, seeded, world

B, T, H = 3, 10, 32
CLASSIFIER = "sequence-classification"


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without labels in padding, as every task makes batches, and on some of the other tokens alone."""
    mask = batch["attention_mask"].bool()
    if batch["labels"].dim() < 2:
        return batch
    some = (torch.rand(mask.shape, generator=seeded(3)) < 0.4) & mask
    some[:, 1:] &= mask[:, :-1]  # what begins a text is predicted from nothing
    return batch | {"labels": torch.where(some, batch["input_ids"], -100)}


def plainly(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of plain transformers."""
    whole = copy.deepcopy(model).requires_grad_(True).train()
    loss = whole(**batch).loss
    loss.backward()
    return loss, {name: value.grad for name, value in whole.named_parameters() if value.grad is not None}


def split(here: Any, batch: dict[str, Tensor], cut: tuple[int, int], rows: str, link: Link | None = None) -> Any:
    """Loss, gradients of both sides, and the messages that crossed."""
    caught: dict[str, Tensor] = {}
    here.server.shared.add = lambda gradients, *_, **__: caught.update(gradients)
    recorded = RecordingLink(link or here.server.connect("a"))
    model = here.client("a", cut, link=recorded)
    model.rows = rows
    loss = model(**batch).loss
    loss.backward()
    own = {name: value.grad for name, value in model.stage.trainable().items()}
    return loss, {**caught, **own}, recorded


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", None), ("gemma3", "causal-lm"), ("falcon-alibi", "causal-lm"), ("qwen3_moe", "causal-lm"),
        ("bert", None), ("modernbert", CLASSIFIER), ("distilbert", CLASSIFIER), ("llama", CLASSIFIER),
    ],
)  # fmt: skip
def test_whole_and_split_are_equal_bit_for_bit(name: str, kind: str | None, padding: str) -> None:
    blocks = 5 if name == "modernbert" else 4
    here = world(name, kind, end=blocks)
    batch = padded(here.batch(padding=padding, batch=B, length=T))
    loss, gradients = plainly(here.whole.model, batch)
    found, both, link = split(here, batch, (1, blocks), "loss")
    assert torch.equal(loss, found)
    assert both.keys() <= gradients.keys()
    assert not [name for name, value in both.items() if not torch.equal(gradients[name], value)]
    tokens, (request,) = int(batch["attention_mask"].sum()), link.sent(ForwardRequest)
    # Experts compute as many tokens together as chose them, padding included; what is read (CLS) may be padding, too.
    whole = name == "qwen3_moe" or (name.endswith("bert") and padding == "left")
    assert request.hidden_BTH.shape == ((B, T, H) if whole else (1, tokens, H))
    rows = KINDS[here.kind].items(batch)
    for message in (*link.sent(ForwardReply), *link.sent(BackwardRequest)):
        assert [value.shape for key, value in vars(message).items() if key.endswith("BTH")] == [(1, rows, H)]


@pytest.mark.parametrize("rows", ["all", "logits", "loss"])
def test_what_rows_says(rows: str) -> None:
    here = world("llama")
    batch = padded(here.batch(padding="right", batch=B, length=T))
    _, _, link = split(here, batch, (1, 4), rows)
    tokens, items = int(batch["attention_mask"].sum()), KINDS[here.kind].items(batch)
    (reply,), (back,) = link.sent(ForwardReply), link.sent(BackwardReply)
    assert reply.hidden_BTH.shape[1] == (items if rows == "loss" else tokens)
    assert back.grad_BTH.shape[1] == tokens


def test_blocks_in_the_tail_read_every_token_and_labelled_padding_crosses() -> None:
    here = world("llama")
    batch = here.batch(padding="right", batch=B, length=T)
    _, _, link = split(here, padded(batch), (1, 3), "loss")
    assert [request.rows_BT for request in link.sent(ForwardRequest)] == [None]
    _, _, link = split(world("llama"), batch | {"labels": batch["input_ids"]}, (1, 4), "loss")
    (request,) = link.sent(ForwardRequest)
    assert request.hidden_BTH.shape == (B, T, H)


def test_heads_that_read_several_tokens_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("modernbert", CLASSIFIER, end=5)
    model = here.client("a", (1, 5))
    batch = here.batch(padding="right", batch=B, length=T)
    hidden_BTH, plan = model.stage.plan(batch)
    rows_BT = Pooling(model.stage).rows(batch, plan, tuple(hidden_BTH.shape))
    assert rows_BT is not None
    assert rows_BT.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    monkeypatch.setattr(model.model.config, "classifier_pooling", "mean")
    assert Pooling(model.stage).rows(batch, plan, tuple(hidden_BTH.shape)) is None


@pytest.mark.parametrize("codec", [None, "int8-row"])
def test_over_a_network_as_in_process(codec: Any) -> None:
    found = []
    for network in (False, True):
        here = world("bert")
        batch = here.batch(padding="right", batch=B, length=T)
        align, form = AlignConfig(kind="kl"), CodecConfig.all(codec or "off")
        with loopback(here.server, "a") as far:
            link = far if network else here.server.connect("a")
            model = here.client("a", (2, 4), align, link=link, codec=form)
            model(**batch).loss.backward()
            traffic = link.meter.training
            gradients = {name: value.grad for name, value in model.stage.trainable().items()}
        found.append((gradients, traffic.bytes_up, traffic.bytes_down))
    assert found[0][1:] == found[1][1:]
    assert all(torch.equal(value, found[1][0][key]) for key, value in found[0][0].items())


def test_counts_that_do_not_fit_are_refused() -> None:
    here = world("llama")
    here.join("a", (1, 4))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    whole = ForwardRequest(1, torch.ones(2, 3, H), mask, train=True)
    packed = sent(whole, without_padding(mask))
    assert packed.hidden_BTH.shape == (1, 3, H)
    assert torch.equal(arrived(packed, "a")[0].hidden_BTH, whole.hidden_BTH * mask.unsqueeze(-1))
    with pytest.raises(LinkError, match="4 tokens came, expected 3"):
        here.server.answer("a", replace(packed, hidden_BTH=torch.ones(1, 4, H)))
    with pytest.raises(LinkError, match="no row of exchange 1 is read"):
        here.server.answer("a", replace(packed, rows_BT=torch.zeros(2, 3, dtype=torch.bool)))
    reply = here.server.answer("a", replace(packed, rows_BT=torch.tensor([[1, 0, 0], [1, 0, 0]])))
    assert reply.hidden_BTH.shape == (1, 2, H)
    with pytest.raises(LinkError, match=r"gradient is \(1, 3, 32\).*expected \(1, 2, 32\)"):
        here.server.answer("a", BackwardRequest(1, torch.ones(1, 3, H)))
    assert here.server.answer("a", BackwardRequest(1, torch.ones(1, 2, H))).grad_BTH.shape == (1, 3, H)
    assert len(Places.of(mask)) == 3
