"""Blocks below the cut that stay as they came: nothing comes back for them, and all else trains as if it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.errors import ConfigError, LinkError
from flexp.links.messages import BackwardReply, BackwardRequest
from flexp.methods import METHODS
from flexp.run.settle import build_world, settle
from tests.harness import RecordingLink, equal, shared_weights, world
from tests.tiny import bert_folder, config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    bert_folder(folder / "model")
    return folder


def method(home: Path, frozen: int, **more: Any) -> Any:
    table = {"align": {"kind": "off"}, "personal": {"frozen_head_blocks": frozen}}
    world = build_world(config(home, method=table, data={"clients": {"cut": [1, 3]}}, **more))
    return METHODS["flexp-sfl"](world)


def test_frozen_blocks_stay_and_nothing_comes_back(home: Path) -> None:
    free, frozen = method(home, 0), method(home, 1)
    for one in (free, frozen):
        one.train_round(1, lambda step: None)
    spent = [one.account("north").training for one in (free, frozen)]
    assert spent[0].bytes_up == spent[1].bytes_up
    assert spent[1].bytes_down == spent[0].bytes_down // 2  # h comes down, ∂total/∂z does not
    first = "bert.encoder.layer.0."
    assert not any(name.startswith(first) for name in frozen.clients["north"].model.stage.trainable())
    before = dict(frozen.world.source.model.named_parameters())
    for name, value in frozen.clients["north"].model.stage.model.named_parameters():
        if name.startswith(first):
            assert torch.equal(value, before[name])
    own = frozen.trained_weights("north")
    assert any(name.startswith("bert.encoder.layer.3.") for name in own)
    assert any(name.startswith("bert.encoder.layer.1.") for name in own)  # the server's


def test_the_rest_trains_as_with_a_gradient_that_nobody_uses() -> None:
    results = []
    for asks in (True, False):
        here = world("bert")
        link = RecordingLink(here.server.connect("a"))
        model = here.client("a", (2, 3), link=link)
        for name, value in model.stage.model.named_parameters():
            if model.stage.within(name, 0, 2):
                value.requires_grad_(False)
        if asks:  # whatever needs a gradient before block 0 has one come back
            model.stage.model.bert.embeddings.LayerNorm.bias.requires_grad_(True)
        model(**here.batch()).loss.backward()
        assert [sent.back for sent in link.sent(BackwardRequest)] == [asks]
        assert [reply.grad_BTH is None for reply in link.sent(BackwardReply)] == [not asks]
        own = {n: v.grad.clone() for n, v in model.stage.trainable().items() if v.grad is not None and "embed" not in n}
        results.append((own, shared_weights(here.server)))
    assert equal(results[0][0], results[1][0])
    assert equal(results[0][1], results[1][1])


def test_a_gradient_that_was_asked_for_must_come(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("bert")
    model = here.client("a", (2, 3))
    loss = model(**here.batch()).loss
    from flexp.server.session import Session

    monkeypatch.setattr(Session, "backward", lambda *_: BackwardReply())
    with pytest.raises(LinkError, match="sends no gradient"):
        loss.backward()


def test_no_more_blocks_can_be_frozen_than_there_are(home: Path) -> None:
    table = {"personal": {"frozen_head_blocks": 2}}
    with pytest.raises(ConfigError, match="more than client north has below its cut, 1"):
        _ = settle(config(home, method=table)).cuts
