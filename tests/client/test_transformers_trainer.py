"""An unchanged transformers.Trainer trains a split model exactly as it trains the whole one."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import flexp
from flexp.config import ModelConfig, ServerConfig
from flexp.errors import ConfigError
from flexp.kinds import KINDS as ALL_KINDS
from flexp.links.messages import ForwardRequest
from flexp.models.anatomy import Part
from flexp.models.stage import carve
from flexp.models.tuning import tune
from tests.client.trainer_tools import (
    LR,
    STEPS,
    Rows,
    all_trained,
    arguments,
    assert_equal,
    federation,
    losses,
    quiet,
    trainer,
    whole,
)
from tests.harness import KINDS, copied, world


@pytest.mark.parametrize(
    ("name", "accumulation", "memory"),
    [("bert", 1, "keep"), ("bert", 2, "recompute"), ("llama", 2, "keep"), ("gpt2", 2, "recompute")],
)
def test_losses_weights_and_scores_are_those_of_the_whole_model(
    tmp_path: Path, name: str, accumulation: int, memory: Any
) -> None:
    here = federation(name, config=ServerConfig(memory=memory))
    split = here.client("a", (2, 3))
    model, stage = whole(here)
    both = [
        trainer(each, here, tmp_path, gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=3)
        for each in (split, model)
    ]
    before = [each.evaluate()["eval_loss"] for each in both]
    for each in both:
        each.train()
    assert before[0] == before[1]
    assert losses(both[0]) == losses(both[1])
    assert len(losses(both[0])) == STEPS
    scores = [[entry["eval_loss"] for entry in each.state.log_history if "eval_loss" in entry] for each in both]
    assert scores[0] == scores[1]
    assert scores[0][-1] < before[0]
    assert_equal(all_trained(here, split), copied(stage.trainable()))
    assert here.server.shared.version == STEPS
    assert not here.server.shared._held


def test_lora_under_a_trainer_equals_lora_on_the_whole_model(tmp_path: Path) -> None:
    from tests.harness import LORA, party

    here = federation("llama", tuning="lora")
    split = here.client("a", (2, 3))
    stage = carve(here.whole, Part.whole(4))
    tune(stage, ModelConfig(id="any", tuning="lora", lora=LORA))
    for part in (party(here.whole, Part.server(1, 4), "lora"), split.stage):
        for name, value in part.trainable().items():
            stage.model.get_parameter(name).data.copy_(value)
    both = [trainer(each, here, tmp_path) for each in (split, stage.model)]
    for each in both:
        each.train()
    assert losses(both[0]) == losses(both[1])
    assert_equal(all_trained(here, split), copied(stage.trainable()))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_trainer_sees_of_every_kind_what_it_sees_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    """What it counts, which columns it drops, what it takes for labels, whether evaluation has a loss."""
    name = {"causal-lm": "llama", "image-classification": "vit"}.get(kind, "bert")
    here = federation(name, kind=kind)
    split = trainer(here.client("a", (2, 3)), here, tmp_path)
    model = trainer(whole(here)[0], here, tmp_path)
    for each in (split, model):
        each._set_signature_columns_if_needed()
    assert sorted(split._signature_columns) == sorted(model._signature_columns)
    assert split._loss_shifts_labels == model._loss_shifts_labels
    assert split.model_accepts_loss_kwargs == model.model_accepts_loss_kwargs
    assert split.label_names == model.label_names
    assert split.evaluate()["eval_loss"] == model.evaluate()["eval_loss"]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_saving_and_predicting(tmp_path: Path, name: str) -> None:
    """A checkpoint has this client's own state, which brings another instance back to the same predictions."""
    here = federation(name)
    split = here.client("a", (2, 4))
    made = trainer(split, here, tmp_path)
    made.train()
    made.save_model(str(tmp_path / "saved"), _internal_call=True)  # as a Trainer does for its checkpoints
    predictions = made.predict(Rows(here, 10)).predictions
    other = here.client("b", (2, 4))
    assert not (trainer(other, here, tmp_path).predict(Rows(here, 10)).predictions == predictions).all()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(here.whole.block_of(key.removeprefix("model.")) in (2, 3) for key in saved)
    other.load_state_dict(saved)  # strictly: tied parameters were written once, and nothing is missing
    assert (trainer(other, here, tmp_path).predict(Rows(here, 10)).predictions == predictions).all()


def test_a_shorter_last_group_of_an_epoch_is_refused_not_silently_wrong() -> None:
    """A loop of one's own that told the server to expect four exchanges, and steps after two."""
    here = federation("bert")
    model = here.client("a", (2, 3), accumulation=4)
    optimizer = torch.optim.AdamW(model.stage.trainable().values(), lr=LR)
    for _ in range(2):
        (model(**here.batch()).loss / 4).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match=r"stepped after 2 exchanges of a step \(accumulation = 4\)"):
        model(**here.batch())


def test_a_loss_that_runs_the_model_twice_is_refused(tmp_path: Path) -> None:
    """The server would take each run for a step of its own."""

    class Twice(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
            return super().compute_loss(model, dict(inputs), **options) + super().compute_loss(model, inputs, **options)

    here = federation("bert")
    made = Twice(model=here.client("a", (2, 3)), args=arguments(tmp_path), train_dataset=Rows(here, 8))
    with pytest.raises(ConfigError, match="the loss ran the model 2 times"):
        quiet(made).train()


def test_adapters_around_a_split_model_are_refused(tmp_path: Path) -> None:
    here = federation("llama")
    model = peft.get_peft_model(here.client("a", (2, 3)), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="would adapt this client's half alone; load model and server with tuning"):
        trainer(model, here, tmp_path)


def test_training_goes_on_after_it_broke_off_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """What the broken step had left on the server is gone, and in the parameters too."""

    class Broken(transformers.TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    here, other = federation("bert"), federation("bert")
    model, fresh = here.client("a", (2, 3)), other.client("a", (2, 3))
    made = trainer(model, here, tmp_path, gradient_accumulation_steps=2)
    made.add_callback(Broken())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    for each, where in ((model, here), (fresh, other)):
        trainer(each, where, tmp_path, gradient_accumulation_steps=2).train()
    assert_equal(all_trained(here, model), all_trained(other, fresh))


def test_exchanges_of_a_step_may_be_in_flight_together() -> None:
    """Two forwards, then two backwards: no step has ended in between, and none is refused."""
    here = federation("bert")
    model = here.client("a", (2, 3), accumulation=2)
    optimizer = torch.optim.AdamW(model.stage.trainable().values(), lr=LR, fused=True)
    for step in range(3):
        seen = [model(**here.batch(seed=half)).loss for half in range(2)]
        for loss in seen:
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert here.server.shared.version == step + 1


def test_image_classifiers(tmp_path: Path) -> None:
    here = federation("vit")
    split = here.client("a", (2, 3))
    model, stage = whole(here)
    both = [trainer(each, here, tmp_path) for each in (split, model)]
    for each in both:
        each.train()
    assert losses(both[0]) == losses(both[1])
    assert_equal(all_trained(here, split), copied(stage.trainable()))
    assert KINDS["vit"] == "image-classification"


def test_the_public_names_are_there_and_cost_nothing_until_used() -> None:
    import subprocess
    import sys

    code = (
        "import sys, flexp; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "assert set(flexp.__all__) <= set(dir(flexp)); assert not hasattr(flexp, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert flexp.SplitModelForCausalLM.kind == "causal-lm"
    assert flexp.SplitModelForSequenceClassification.kind == "sequence-classification"
    assert flexp.SplitModelForImageClassification.kind == "image-classification"
    from flexp import Server

    assert flexp.Server is Server


@pytest.mark.parametrize(
    ("name", "cls"), [("llama", "SplitModelForCausalLM"), ("vit", "SplitModelForImageClassification")]
)
def test_from_pretrained_on_both_sides(name: str, cls: str) -> None:
    """The example of the docstrings, with a zoo model; what is not this party's is never there."""
    server = flexp.Server.from_pretrained(f"arch:{name}", KINDS[name], end=3)  # type: ignore[arg-type]
    assert server.blocks == (1, 3)
    model = getattr(flexp, cls).from_pretrained(f"arch:{name}", cut=(2, 3), link=server.connect("clinic-a"))
    batch = world(name).batch()
    loss = model.train()(**batch).loss
    loss.backward()
    assert math.isfinite(loss.item())
    assert server.shared.version == 1
    assert {model.stage.block_of(key) for key in model.personal_state()} == {0, 1, 3, None}
    with pytest.raises(ConfigError, match="cut"):
        getattr(flexp, cls).from_pretrained(f"arch:{name}", cut=(2, 9), link=server.connect("clinic-b"))


def test_a_step_may_be_taken_by_hand() -> None:
    """The same in ten plain lines of PyTorch: a split model is an nn.Module."""
    here = federation("bert")
    model = here.client("a", (2, 3))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=LR)
    seen = []
    for _ in range(4):
        output = model(**here.batch())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(output.loss.item())
    assert seen[-1] < seen[0]
    assert here.server.shared.version == 4
    assert ForwardRequest.__name__ not in model.state_dict()
    logging.getLogger("flexp").debug("losses %s", seen)
