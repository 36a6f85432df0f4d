"""Every option of a Trainer around a split model is equal to whole training, each half's own, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from flexp.client.callback import TrainerCallback
from flexp.client.model import SplitModel
from flexp.client.trainer_options import REFUSED
from flexp.config import OptimizerConfig
from flexp.errors import ConfigError
from flexp.links.opening import loopback
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.models.zoo import tiny_model
from flexp.server import Server
from tests.client.trainer_matrix import EQUAL, OWN, PAGE, TRIED, Case, missing, page
from tests.client.trainer_tools import LR, Rows, all_trained, arguments, assert_equal, federation, quiet, whole
from tests.harness import KINDS, World, copied, party

STEPS = 3
CUT = (2, 3)


def here_for(name: str, case: Case) -> World:
    if "bf16" not in case.values:
        return federation(name, steps=STEPS)
    model = tiny_model(name, task=KINDS[name])  # type: ignore[arg-type]
    source = Stage.whole(model.requires_grad_(False))
    source.autocast = torch.bfloat16
    optimizer = OptimizerConfig(name="adamw", lr=LR, schedule="linear", clip=None)
    server = Server(party(source, Part.server(1, 4), "full"), optimizer=optimizer, total_steps=STEPS)
    return World(source, server, "full", KINDS[name])


def short_of_memory(model: Any, inputs: dict[str, Tensor]) -> None:
    if model.training and len(inputs["input_ids"]) > 2:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def train(name: str, case: Case, folder: Path, *, split: bool, trainer: Any = transformers.Trainer) -> Any:
    """Everything that came of it: losses, scores, predictions, counted tokens; and weights."""
    resume: list[Any] = [None, True] if case.resumed else [None]
    for checkpoint in resume:
        here = here_for(name, case)
        model, stage = (here.client("a", CUT), None) if split else whole(here)
        options = {"max_steps": STEPS, **case.values}
        made = trainer(
            model=model,
            args=arguments(folder, **options),
            train_dataset=Rows(here, case.rows),
            eval_dataset=Rows(here, 6),
            compute_metrics=lambda seen: {"length": len(seen.predictions)},
        )
        quiet(made)
        if "auto_find_batch_size" in case.values:
            model.register_forward_pre_hook(lambda module, _, inputs: short_of_memory(module, inputs), with_kwargs=True)
        if case.resumed and checkpoint is None:
            made.add_callback(Stop())
        made.train(resume_from_checkpoint=checkpoint)
    kept = [{k: v for k, v in entry.items() if k in ("loss", "eval_loss", "step")} for entry in made.state.log_history]
    weights = all_trained(here, model) if split else copied(stage.trainable())  # type: ignore[union-attr]
    told: Any = made.predict(Rows(here, 6))
    batches = [told.predictions, told.label_ids]
    pairs = zip(*batches, strict=True) if isinstance(told.predictions, list) else [batches]
    predictions = [of_text(*pair) for pair in pairs]
    return kept, predictions, made.state.num_input_tokens_seen, weights


def of_text(logits: Any, labels: Any) -> Any:
    """Without what stands in padding, on the right of all labels: it does not cross, so nobody predicts it."""
    if logits.ndim < 3:
        return logits
    return logits[np.flip(np.maximum.accumulate(np.flip(labels != -100, 1), 1), 1)]


class Stop(transformers.TrainerCallback):
    """After one step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_save = control.should_evaluate = True


@pytest.mark.parametrize(
    ("name", "case"),
    [  # every row with one of the two models; `make soak` adds the other
        pytest.param(name, case, id=f"{next(iter(case.values))}-{name}", marks=[pytest.mark.slow] * ((row + other) % 2))
        for row, case in enumerate(EQUAL)
        for other, name in enumerate(("llama", "bert"))
    ],
)
def test_equal_to_whole_training(tmp_path: Path, name: str, case: Case) -> None:
    try:
        one = train(name, case, tmp_path / "split", split=True)
        other = train(name, case, tmp_path / "whole", split=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert one[0] == other[0]
    assert len([entry for entry in one[0] if "loss" in entry]) == STEPS
    pairs = zip(one[1], other[1], strict=True)
    assert all(np.array_equal(left, right) for left, right in pairs)
    assert one[2] == other[2]
    assert_equal(one[3], other[3])


class TwoHalves(transformers.Trainer):
    """The whole model, of which the Trainer's rules reach the client's half alone, and the server's another one."""

    def create_optimizer(self, model: Any = None) -> Any:
        blocks = self.model.get_submodule("model.layers" if hasattr(self.model, "lm_head") else "bert.encoder.layer")
        self.middle = [value for block in blocks[slice(*CUT)] for value in block.parameters()]
        for value in self.middle:
            value.requires_grad_(False)
        made = super().create_optimizer(model)
        for value in self.middle:
            value.requires_grad_(True)
        self.other = torch.optim.AdamW(self.middle, lr=LR, weight_decay=0.0, fused=True)
        self.add_callback(self.StepOther(self))
        return made

    def _clip_grad_norm(self, model: Any) -> Any:
        ours = {id(value) for value in self.middle}
        own = [value for value in model.parameters() if id(value) not in ours]
        return torch.nn.utils.clip_grad_norm_(own, self.args.max_grad_norm)

    class StepOther(transformers.TrainerCallback):
        def __init__(self, made: TwoHalves) -> None:
            self.made = made

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for group in self.made.other.param_groups:
                group["lr"] = LR * ((STEPS - state.global_step) / STEPS)
            self.made.other.step()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("case", OWN, ids=lambda case: str(case.values["optim"]))
def test_each_half_has_rules_of_its_own(tmp_path: Path, name: str, case: Case) -> None:
    one = train(name, case, tmp_path / "split", split=True)
    other = train(name, case, tmp_path / "whole", split=False, trainer=TwoHalves)
    assert one[0] == other[0]
    assert_equal(one[3], other[3])


@pytest.mark.parametrize("option", REFUSED)
def test_refused_in_one_line_before_the_first_step(tmp_path: Path, option: str) -> None:
    args = arguments(tmp_path)
    if option == "local_rank":
        args._n_gpu = 2
    else:
        setattr(args, option, TRIED[option])
    here = federation("bert", steps=STEPS)

    def refuse(model: SplitModel) -> None:
        with pytest.raises(ConfigError, match=f"^TrainingArguments.{option} = ") as caught:
            TrainerCallback().on_init_end(args, None, None, model=model)
        assert "\n" not in str(caught.value)

    if option == "load_best_model_at_end":
        with loopback(here.server, "a") as link:
            refuse(here.client("a", CUT, link=link))
    else:
        refuse(here.client("a", CUT))
    assert here.server.shared.version == 0


def test_a_trainer_refuses_by_itself_when_it_is_made_and_when_it_publishes(tmp_path: Path) -> None:
    here = federation("bert", steps=STEPS)
    model = here.client("a", CUT)
    with pytest.raises(ConfigError, match="optim = adafactor"):
        transformers.Trainer(model=model, args=arguments(tmp_path, optim="adafactor"))
    made = transformers.Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(here, 4))
    with pytest.raises(ConfigError, match="push_to_hub"):
        made.push_to_hub()
    made.args.torch_compile = True  # after it was made
    with pytest.raises(ConfigError, match="torch_compile"):
        made.train()


def test_the_page_is_what_was_tried() -> None:
    assert missing() == set()
    assert REFUSED.keys() == TRIED.keys()
    assert PAGE.read_text(encoding="utf-8") == page(), "stale: python -m tests.client.trainer_matrix"
