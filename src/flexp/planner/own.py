"""The cut that this process gets by itself: what ``flexp.SplitModel….from_pretrained(cut="auto")`` asks for."""

from __future__ import annotations

import logging

from flexp.config import AlignConfig, ModelConfig
from flexp.cost.device import this_machine
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
