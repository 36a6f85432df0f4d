"""A whole model behind the interface of a split one, for methods whose clients hold all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexp.client.steps import Piece
from flexp.models.stage import Stage


class WholeModel:
    """Trains and answers in one place; nothing crosses any link."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.last_align: float | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        first: Tensor = next(iter(self.stage.model.parameters()))
        return first.device

    def __call__(self, **batch: Any) -> Any:
        with self.stage.computing():
            return self.stage.model(**batch, **self.stage.no_cache)

    def train(self, mode: bool = True) -> WholeModel:
        self.stage.model.train(mode)
        return self

    @contextmanager
    def part_of_step(self, piece: Piece) -> Iterator[None]:
        yield

    def after_step(self) -> None:
        pass

    def personal_state(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.stage.trainable().items()}

    def load_personal_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.stage.trainable().items():
                parameter.copy_(state[name])
