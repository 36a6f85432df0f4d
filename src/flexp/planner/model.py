"""What planning asks of a model, answered by counting it (:mod:`flexp.cost.model_cost`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexp.cost.choice import Choice, Prediction
from flexp.cost.model_cost import ModelCost, model_cost
from flexp.cost.predict import memory, predict, resting
from flexp.cost.profile import Profile
from flexp.planner.fleet import Choices, TaskShape


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

    def predict(self, profile: Profile, choice: Choice) -> Prediction:
        """One step of a client on ``profile``."""
        return predict(
            self._cost(self.task), profile, choice, self.server, base_depth=self.base_depth, followed=self.followed
        )

    def resting(self, choice: Choice) -> int:
        """What a client holds between two steps."""
        return resting(self._cost(self.task), choice, followed=self.followed)

    def block_bytes(self, rank: int | None) -> tuple[int, ...]:
        """Of each block on the server, with gradient and optimiser state."""
        cost = self._cost(self.task)
        return tuple(cost.server_weights(block, block + 1, rank) for block in range(self.blocks))

    def memory(self, task: TaskShape, choice: Choice) -> int:
        """The client's peak when the task is another one."""
        base = self.base_depth is not None and choice.cut[0] > self.base_depth
        return memory(self._cost(task), choice, base=base, followed=self.base_depth if task.follow else None)

    def _cost(self, task: TaskShape) -> ModelCost:
        model = task.model(self.model)
        key = (task.kind, task.length, model.dtype, model.train_embeddings, model.embeddings)
        if key not in self._known:
            self._known[key] = model_cost(
                model, task.kind, length=task.length, labels=task.labels, optimizer=task.optimizer
            )
        return self._known[key]
