"""Centralized: one whole model on all participants' training data in one place: what sharing the data would give.

A bound for the score on everybody's data, not always for the personal one. Budget: as many gradient steps in a round
as all participants together take, on batches of the same size from the pooled examples, with one optimiser that lasts.
Every client's personal model is this model. It is trained by the server; that the data had to go there is not in the
bytes. With one client it is local training.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from torch import Tensor

from flexp.client.personal import WholeModel
from flexp.client.trainer import Trainer
from flexp.data.types import ClientData
from flexp.links.base import Traffic
from flexp.methods.base import Account, Forward, Holds, Method, OnStep, State, World
from flexp.methods.parties import client_seed, own_stage
from flexp.models.anatomy import Part
from flexp.optim import Updater


class Centralized(Method):
    """One model, trained on everybody's data in one place: a bound."""

    name = "centralized"
    same_for_all = True
    sends = "its data"
    held = Holds(None)
    timing = None
    effort = 0.8

    def __init__(self, world: World) -> None:
        super().__init__(world)
        clients = world.participants
        self.names = [data.name for data in clients]
        pool = ClientData("+".join(self.names), list(chain.from_iterable(data.train for data in clients)), [], [])
        stage = own_stage(world, Part.whole(world.source.anatomy.blocks))
        config = world.config
        updater = Updater(stage.trainable(), config.train.personal, world.total_steps * len(clients), stage.new)
        seed = client_seed(config.seed, pool.name)
        self.model = WholeModel(stage)
        self.trainer = Trainer(pool, world.federation.task, self.model, updater, config.train, seed=seed)

    def train_round(self, number: int, on_step: OnStep) -> None:
        for _ in range(self.world.config.train.steps_per_round):
            for name in self.names:  # a client's share of the steps; the data are everybody's
                step = self.trainer.step()
                on_step(replace(step, client=name, number=(step.number - 1) // len(self.names) + 1))

    def personal(self, client: str) -> Forward:
        return self.trainer.personal

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.personal_state().items()}

    def account(self, client: str) -> Account:
        if client in self.world.absent:
            return Account(0, Traffic(), Traffic(), 0.0, 0.0)
        share = len(self.names)
        return Account(
            personal_parameters=0,
            training=Traffic(),
            evaluation=Traffic(),
            client_seconds=0.0,
            server_seconds=self.trainer.seconds / share,
            gradient_evaluations=self.trainer.steps // share,
        )

    def server_facts(self) -> dict[str, float]:
        return {
            "parameters": sum(value.numel() for value in self.model.stage.model.parameters()),
            "trained_parameters": sum(value.numel() for value in self.model.personal_state().values()),
            "updates": self.trainer.steps,
            "compute_seconds": self.trainer.seconds,
        }

    def state(self) -> State:
        return {"server": self.trainer.state()}

    def load(self, state: State) -> None:
        self.trainer.load(state["server"])
