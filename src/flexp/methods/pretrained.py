"""Pretrained: no training. The model as it came, a new classifier being random: what every other method starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from flexp.client.personal import WholeModel, answering
from flexp.links.base import Traffic
from flexp.methods.base import Account, Forward, Holds, Method, OnStep, State, World


class Pretrained(Method):
    """No training: the model as it came."""

    name = "pretrained"
    same_for_all = True
    held = Holds(None)
    timing = None
    tuned = False
    effort = 0.1

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.model = WholeModel(world.source)

    def train_round(self, number: int, on_step: OnStep) -> None:
        pass

    def personal(self, client: str) -> Forward:
        return answering(self.model)

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        return {}

    def account(self, client: str) -> Account:
        return Account(0, Traffic(), Traffic(), 0.0, 0.0)

    def state(self) -> State:
        return {"server": {"nothing": torch.zeros(1)}}  # a checkpoint's file wants a tensor

    def load(self, state: State) -> None:
        pass
