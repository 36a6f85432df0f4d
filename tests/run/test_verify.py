"""What `flexp verify` says must be true: it sees a difference where there is one, and compares what it names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, T5Config

from flexp.client.model import SplitModel
from flexp.client.personal import WholeModel
from flexp.config import ModelConfig
from flexp.errors import ConfigError, ModelError
from flexp.models.loading import load_stage
from flexp.models.stage import Stage
from flexp.models.zoo import save_tiny, tiny_batch
from flexp.optim import Updater
from flexp.run.verify import Outcome, Setup, difference, kind_of, largest, verify, verify_all


def test_a_folder_is_loaded_part_by_part_and_is_exact(tmp_path: Path) -> None:
    folder = save_tiny("llama-tied", tmp_path)
    outcome = verify(Setup.of(str(folder), padding="left", base_depth=0, cut=(2, None), steps=2))
    assert outcome.exact
    assert (outcome.blocks, outcome.tensors) == (4, 38)
    setup = outcome.setup
    assert (setup.task, setup.cut, setup.model.base_depth) == ("causal-lm", (2, 4), 0)


def test_dropout_of_a_checkpoint_is_set_to_zero(tmp_path: Path) -> None:
    model = BertModel(BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=40))
    assert model.config.hidden_dropout_prob == 0.1
    model.save_pretrained(tmp_path)
    outcome = verify(Setup.of(str(tmp_path), padding="right", steps=2))
    assert outcome.exact
    assert (outcome.setup.task, outcome.setup.cut) == ("sequence-classification", (1, 2))


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_all_settings_together(name: str) -> None:
    setup = Setup.of(
        f"arch:{name}", tuning="lora", dtype="bfloat16", memory="recompute", gradient_checkpointing=True, steps=2
    )
    assert verify(setup).exact


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt-projected", "vit"])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_mixed_precision_is_exact_too(name: str, memory: str) -> None:
    # Of the four, BERT and OPT read a block's input three times: gradients summed in another type would show.
    outcome = verify(Setup.of(f"arch:{name}", autocast="bfloat16", memory=memory, steps=2))  # type: ignore[arg-type]
    assert outcome.exact
    assert outcome.setup.model.autocast == "bfloat16"


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_in_float32() -> None:
    stages = [
        load_stage(ModelConfig.of("arch:bert", autocast=kind), "sequence-classification")
        for kind in ("off", "bfloat16")
    ]
    batch = tiny_batch(stages[0].model, batch=3, length=10, seed=0)
    plain, mixed = (WholeModel(stage)(**batch) for stage in stages)
    assert mixed.logits.dtype == torch.bfloat16
    assert 0 < float((plain.loss - mixed.loss).abs()) < 1e-2
    assert {value.dtype for value in stages[1].model.parameters()} == {torch.float32}


def wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Stage.plan_without_inputs
    monkeypatch.setattr(Stage, "plan_without_inputs", lambda self, hidden, mask, *more: plan(self, hidden, None))
    monkeypatch.setattr(Stage, "_compare", lambda *_: None)


def rounded_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Stage.run
    monkeypatch.setattr(Stage, "run", lambda self, hidden, *more: run(self, hidden * (1 + 2e-7), *more))


def lost_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Updater, "step", lambda self, norm=None: 0.0)


def lost_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    trainable = Stage.trainable
    monkeypatch.setattr(Stage, "trainable", lambda self: dict(list(trainable(self).items())[1:]))


def scaled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = SplitModel.tail

    def scaled(self: Any, sent: Any) -> Any:
        output = tail(self, sent)
        output.loss = output.loss * 1.000001
        return output

    monkeypatch.setattr(SplitModel, "tail", scaled)


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (wrong_mask, {"logits", "gradients", "losses", "weights"}),
        (rounded_activations, {"logits", "gradients", "weights"}),
        (lost_update, {"weights", "losses"}),
        (lost_gradient, {"gradients", "weights"}),
        (scaled_loss, {"losses", "gradients"}),
    ],
)
def test_a_split_that_is_wrong_is_seen(harm: Any, seen: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harm(monkeypatch)
    outcome = verify(Setup.of("arch:llama", padding="left"))
    assert not outcome.exact
    assert all(getattr(outcome, key) > 0 for key in seen)


def test_differences_are_never_lost() -> None:
    one = torch.tensor([1.0, -2.0])
    assert difference(one, one.clone()) == difference(None, None) == 0.0
    assert difference(one, one + torch.tensor([0.0, 0.5])) == 0.5
    nan = torch.tensor([1.0, math.nan])
    for pair in ((one, None), (None, one), (one, one[:1]), (one, nan), (nan, nan)):
        assert difference(*pair) == math.inf
    assert largest({"a": one, "b": one}, {"a": one, "b": one + 1}) == 1.0
    assert largest({"a": one}, {"a": one, "b": one}) == largest({"a": one, "b": one}, {"a": one}) == math.inf
    assert largest({}, {}) == 0.0


def test_outcomes_become_json() -> None:
    good = Outcome(Setup.of("arch:llama", cut=(1, 3)), 4, 39, 0.0, 0.0, 0.0, 0.0)
    values = json.loads(json.dumps(good.as_json()))
    assert values["exact"] is True
    assert (values["model"], values["cut"], values["gradients"]) == ("arch:llama", [1, 3], 0.0)
    bad = Outcome(Setup.of("arch:llama"), error="no").as_json()
    assert bad["exact"] is False
    assert bad["logits"] is None
    assert json.dumps(bad, allow_nan=False)


def test_all_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexp.run import verify as module

    kept = {name: module.ARCHITECTURES[name] for name in ("gpt2", "t5", "vit", "bert")}
    monkeypatch.setattr(module, "ARCHITECTURES", kept)
    told: list[str] = []
    outcomes = list(verify_all(Setup.of("", padding="left", cut=(1, 3), steps=1), told.append))
    assert told == ["gpt2", "vit", "bert"]
    assert [outcome.setup.padding for outcome in outcomes] == ["left", "none", "left"]
    assert all(outcome.exact for outcome in outcomes)
    for outcome in verify_all(Setup.of("", cut=(1, 9))):
        assert "does not fit a model of 4 blocks" in str(outcome.error)
        assert not outcome.exact


def test_what_a_checkpoint_is_for(tmp_path: Path) -> None:
    assert kind_of("arch:vit") == "image-classification"
    for name, task, kind in (
        ("gpt2", "causal-lm", "causal-lm"),
        ("gpt2", "sequence-classification", "sequence-classification"),
        ("vit", None, "image-classification"),
    ):
        folder = save_tiny(name, tmp_path / f"{name}-{task}", task=task)  # type: ignore[arg-type]
        assert kind_of(str(folder)) == kind
    BertConfig().save_pretrained(tmp_path / "bare")
    assert kind_of(str(tmp_path / "bare")) == "sequence-classification"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no arch:gpt5; expected arch: and one of gpt2, "):
        verify(Setup.of("arch:gpt5"))
    with pytest.raises(
        ModelError, match=r"arch:albert cannot be split: one block is applied again and again.*; use one"
    ):
        verify(Setup.of("arch:albert"))
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) cannot be split: it is an encoder–decoder.*use a decoder-only"):
        verify(Setup.of(str(tmp_path)))
    with pytest.raises(ModelError, match="arch:vit has no task 'causal-lm'"):
        verify(Setup.of("arch:vit", task="causal-lm"))
    with pytest.raises(ConfigError, match=r"--cut = \(3, 9\) does not fit a model of 4 blocks"):
        verify(Setup.of("arch:llama", cut=(3, 9)))
    with pytest.raises(ConfigError, match=r"--base-depth = 2 does not fit the cut \(1, 3\): expected 0 <= s_min <= 1"):
        verify(Setup.of("arch:llama", base_depth=2))
    with pytest.raises(ConfigError, match="there is no link 'pigeon'; expected one of: in-process"):
        verify(Setup.of("arch:llama", link="pigeon"))
    with pytest.raises(ModelError, match="images have no padding"):
        verify(Setup.of("arch:vit", padding="left"))
    with pytest.raises(ModelError, match="length 65 does not fit"):
        verify(Setup.of("arch:llama", length=65))
