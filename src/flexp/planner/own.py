"""This process as a device: what it may use, and the cut that it gets by itself."""

from __future__ import annotations

import logging

import torch

from flexp.config import AlignConfig, ModelConfig
from flexp.cost.device import training_memory
from flexp.cost.profile import Profile
from flexp.limits import maps_count
from flexp.models.loading import ModelKind
from flexp.planner.fleet import Choices, TaskShape, of_run
from flexp.planner.model import ModelCosts
from flexp.planner.plan import make_plan
from flexp.report.formats import cut as cut_words
from flexp.report.formats import size

OFF = AlignConfig(kind="off")

log = logging.getLogger("flexp")


def this_machine() -> Profile:
    """What this process may use, with the speed and the network of a laptop, which were not measured."""
    tightest = training_memory(torch.get_num_threads())
    laptop = Profile.from_class("laptop")
    return laptop.model_copy(
        update={
            "name": "this machine",
            "memory_bytes": max(1, tightest.free_bytes),
            "memory_from": f"this machine's memory ({tightest.name})",
        }
    )


def own_cut(
    model: ModelConfig, kind: ModelKind, largest: tuple[int, int], *, labels: int = 2, align: AlignConfig = OFF
) -> tuple[int, int]:
    """The cut (s, e) that ``data.clients.cuts = "auto"`` would give a single client in this process; it is logged.

    Args:
        largest: examples and tokens of the largest exchange.
        labels: classes, of classifiers.

    Raises:
        InfeasibleError: no cut fits what this process may use.
        ModelError: there is no such model, or it cannot be split.
    """
    examples, length = largest
    task = TaskShape.of_model(
        model,
        kind=kind,
        batch_size=examples,
        length=length,
        labels=labels,
        aligned=align.has_term or align.teach,
        follow=align.follow,
    )
    if maps_count():
        task = task.model_copy(update={"embeddings": "memory"})
    choices = Choices(micro_batches=[task.batch_size], checkpointing=[model.gradient_checkpointing])
    costs = ModelCosts(model.id, task, choices, Profile.from_class("server"))
    costs.block_bytes(task.rank if task.tuning == "lora" else None)  # counting takes memory: it comes before measuring
    plan = make_plan(of_run(None, ["this process"], task, choices, this_machine), costs)
    here, option = plan.fleet.devices[0].profile, plan.solution.options["this process"]
    log.info(
        "cut %s planned: %s of the %s that %s leaves", cut_words(option.choice.cut),
        size(option.prediction.memory_bytes), size(here.memory_bytes), here.memory_from,
    )  # fmt: skip
    return option.choice.cut
