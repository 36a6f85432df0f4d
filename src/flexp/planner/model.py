"""Planning for a real model, whose costs are counted (:mod:`flexp.cost.model_cost`); and for this process alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexp.config import AlignConfig, ModelConfig
from flexp.cost.choice import Choice, Prediction
from flexp.cost.device import this_machine
from flexp.cost.memory import adapters_bytes, memory, resting, server_memory
from flexp.cost.model_cost import ModelCost, model_cost
from flexp.cost.predict import Terms, predict
from flexp.cost.profile import Profile
from flexp.kinds import ModelKind
from flexp.limits import maps_count
from flexp.planner.fleet import Choices, TaskShape, of_run
from flexp.planner.plan import make_plan
from flexp.report.formats import cut as shown
from flexp.report.formats import size

log = logging.getLogger("flexp")


class ModelCosts:
    """A model's costs for a task and a server; see :class:`flexp.planner.plan.Costs`.

    Raises:
        ModelError: there is no such model, or it cannot be split.
    """

    def __init__(self, model: str, task: TaskShape, choices: Choices, server: Profile) -> None:
        self.model, self.task, self.server = model, task, server
        self._known: dict[Any, ModelCost] = {}
        self.name = Path(model).name
        cost = self._cost(task)
        self.fingerprint, self.blocks = cost.fingerprint, cost.blocks
        # The least s that may come out: the real base depth may turn out deeper, and less be sent.
        self.base_depth = min(choices.starts or [1]) if task.aligned else None
        self.followed = self.base_depth if task.follow else None
        self._terms = Terms(self.base_depth, self.followed, task.rows, task.read, task.frozen, task.anew, task.own)

    def predict(self, profile: Profile, choice: Choice) -> Prediction:
        """One step of a client on ``profile``."""
        found = predict(self._cost(self.task), profile, choice, self.server, self._terms)
        own = adapters_bytes(self._shared, choice) if self.task.own else 0
        return replace(found, server_memory_bytes=server_memory(self._shared, choice) + own)

    def resting(self, choice: Choice) -> int:
        """What a client holds between two steps."""
        return resting(self._cost(self.task), choice, followed=self.followed, frozen=self.task.frozen)

    def block_bytes(self, rank: int | None) -> tuple[int, ...]:
        """Of each block on the server, with gradient and optimiser state."""
        shared = self._shared
        return tuple(shared.server_weights(block, block + 1, rank) for block in range(self.blocks))

    @property
    def _shared(self) -> ModelCost:
        """Of blocks as the server has them; blocks in fewer bits are for adapters."""
        how = self.task.server_quantization
        if how is None or self.task.adapters is None:
            return self._cost(self.task)
        return self._cost(self.task.model_copy(update={"quantization": how, "quantize_ends": False}))

    def memory(self, task: TaskShape, choice: Choice) -> int:
        """The client's peak when the task is another one."""
        base = self.base_depth is not None and choice.cut[0] > self.base_depth
        followed = self.base_depth if task.follow else None
        return memory(self._cost(task), choice, base=base, followed=followed, frozen=task.frozen)

    def _cost(self, task: TaskShape) -> ModelCost:
        model = task.model(self.model)
        loaded = (model.dtype, model.train_embeddings, model.embeddings, model.blocks)
        key = (task.kind, task.length, task.pools, *loaded, model.quantization, model.quantize_ends)
        if key not in self._known:
            self._known[key] = model_cost(
                model, task.kind, length=task.length, labels=task.labels, optimizer=task.optimizer, pools=task.pools
            )
        return self._known[key]


def own_cut(
    model: ModelConfig, kind: ModelKind, largest: tuple[int, int], *, labels: int = 2, align: AlignConfig | None = None
) -> tuple[int, int]:
    """The cut (s, e) that ``data.clients.cut = "auto"`` would give a single client in this process; it is logged.

    It is what ``flexp.SplitModel….from_pretrained(cut="auto")`` asks for.

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
        aligned=align is not None and (align.has_term or align.teach),
        follow=align is not None and align.follow,
        rows="logits",
    )
    if maps_count():
        task = task.model_copy(update={"embeddings": "memory"})
    choices = Choices(micro_batches=[task.batch_size], checkpointing=[model.gradient_checkpointing])
    costs = ModelCosts(model.id, task, choices, Profile.from_class("server"))
    costs.block_bytes(task.adapters)  # counting takes memory: it comes before measuring
    plan = make_plan(of_run(None, {"this process": this_machine(model.device)}, task, choices), costs)
    here, option = plan.fleet.devices[0].profile, plan.solution.options["this process"]
    log.info(
        "cut %s planned: %s of the %s that %s leaves", shown(option.choice.cut),
        size(option.prediction.memory_bytes), size(here.memory_bytes), here.memory_from,
    )  # fmt: skip
    return option.choice.cut
