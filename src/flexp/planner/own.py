"""The cut that this process gets by itself: what ``flexp.SplitModel….from_pretrained(cut="auto")`` asks for."""

from __future__ import annotations

import logging
from typing import Any

from flexp.cost.device import this_machine
from flexp.cost.profile import Profile
from flexp.limits import maps_count
from flexp.planner.fleet import Choices, TaskShape, of_run
from flexp.planner.model import ModelCosts
from flexp.planner.plan import make_plan
from flexp.report.formats import cut as cut_words
from flexp.report.formats import size

log = logging.getLogger("flexp")


def own_cut(
    model: str, kind: str, largest: tuple[int, int], checkpointing: bool = False, *, tuning: str = "full", **shape: Any
) -> tuple[int, int]:
    """The cut (s, e) that ``data.clients.cuts = "auto"`` would give a single client in this process; it is logged.

    Args:
        largest: examples and tokens of the largest exchange.
        tuning: full, lora, or frozen, which is planned as full.
        shape: further fields of :class:`flexp.planner.fleet.TaskShape`.

    Raises:
        InfeasibleError: no cut fits what this process may use.
        ModelError: there is no such model, or it cannot be split.
    """
    examples, length = largest
    task = TaskShape.model_validate(
        {
            **shape,
            "kind": kind,
            "batch_size": examples,
            "length": length,
            "tuning": "lora" if tuning == "lora" else "full",
            **({"embeddings": "memory"} if maps_count() else {}),
        }
    )
    choices = Choices(micro_batches=[task.batch_size], checkpointing=[checkpointing])
    costs = ModelCosts(model, task, choices, Profile.from_class("server"))
    costs.block_bytes(task.rank if task.tuning == "lora" else None)  # counting takes memory: it comes before measuring
    plan = make_plan(of_run(None, ["this process"], task, choices, this_machine), costs)
    here, option = plan.fleet.devices[0].profile, plan.solution.options["this process"]
    log.info(
        "cut %s planned: %s of the %s that %s leaves", cut_words(option.choice.cut),
        size(option.prediction.memory_bytes), size(here.memory_bytes), here.memory_from,
    )  # fmt: skip
    return option.choice.cut
