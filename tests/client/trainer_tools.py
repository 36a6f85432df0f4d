"""A tiny split model and the same model in one piece, under transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from flexp.client.model import SplitModel
from flexp.config import ModelConfig, OptimizerConfig
from flexp.models.anatomy import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from tests.harness import World, copied, shared_weights, world

LR, STEPS = 1e-3, 6


class Rows(Dataset[dict[str, Tensor]]):
    """Padded rows with losses on unequal numbers of tokens."""

    def __init__(self, here: World, count: int = 24) -> None:
        self.batch = here.batch(batch=count, length=12, padding="right", seed=1)
        generator = torch.Generator().manual_seed(3)
        if here.kind == "causal-lm":
            for row, skipped in enumerate(torch.randint(0, 8, (count,), generator=generator)):
                self.batch["labels"][row, :skipped] = -100

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    """Without clipping and decay, which are each party's own."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
    }
    return transformers.TrainingArguments(**settings | changes)


def trainer(model: Any, here: World, folder: Path, *, rows: int = 24, **changes: Any) -> transformers.Trainer:
    args, data = arguments(folder, **changes), Rows(here, rows)
    return quiet(transformers.Trainer(model=model, args=args, train_dataset=data, eval_dataset=Rows(here, 10)))


def quiet(made: transformers.Trainer) -> transformers.Trainer:
    """Prints nothing."""
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(made: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def federation(name: str, tuning: str = "full", *, steps: int = STEPS, **options: Any) -> World:
    """A server that trains its half as the Trainer does."""
    optimizer = OptimizerConfig(name="adamw", lr=LR, schedule="linear", clip=None)
    return world(name, tuning=tuning, **{"optimizer": optimizer, "total_steps": steps} | options)


def whole(here: World) -> tuple[Any, Stage]:
    """The same model in one piece, with the same parameters trained."""
    stage = carve(here.whole, Part.whole(here.whole.anatomy.blocks))
    tune(stage, ModelConfig(id="any"))
    return stage.model, stage


def all_trained(here: World, model: SplitModel) -> dict[str, Tensor]:
    start, stop = model.cut
    server = shared_weights(here.server).items()
    used = {key: value for key, value in server if start <= (here.whole.block_of(key) or 0) < stop}
    return copied(model.personal_state()) | used


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
