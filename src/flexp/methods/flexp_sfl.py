"""FlexP-SFL: flexible personalized split federated learning (Yuan et al., 2025, arXiv 2508.10349).

Every client keeps the ends of the model and as many blocks as its cut says, and trains them on its private data. The
server trains the shared middle with every client's gradient as it arrives. Personal parts are never averaged, nobody
waits for anybody, and an alignment term ties the personal copies of the blocks [s_min, s) to the server's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexp.client.model import SplitModel
from flexp.client.state import load_party, party_state
from flexp.client.trainer import Trainer
from flexp.links.base import Link
from flexp.methods.base import Account, Forward, OnStep, State, World
from flexp.methods.parties import make_trainer, own_stage, own_world, split_model
from flexp.methods.turns import turns
from flexp.models.parts import Part
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.server import Server


class FlexpSfl:
    """The method of this project: one server, and a personal model for each client.

    With one client and alignment off it equals training the whole model.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.server = self._make_server()
        self.clients = {data.name: self._make_client(data.name) for data in world.federation.clients}

    def train_round(self, number: int, on_step: OnStep) -> None:
        config = self.world.config
        for name in turns(self.world.participant_names, config.train, config.seed, number):
            on_step(self.clients[name].step())
        if number == config.train.rounds:
            self.server.flush()  # update = "mean" may have steps left that are fewer than mean_over

    def connect(self, name: str) -> Link:
        """The link of a client."""
        return self.server.connect(name)

    def personal(self, client: str) -> Forward:
        model = self._model(client)

        def forward(batch: Mapping[str, Tensor]) -> Any:
            model.eval()
            with torch.no_grad():
                return model(**batch)

        return forward

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        shared, middle = self.server.shared, range(*self.world.cuts[client])
        weights = {
            name: value for name, value in shared.updater.parameters.items() if shared.stage.block_of(name) in middle
        }
        return {
            name: value.detach().clone() for name, value in {**weights, **self._model(client).personal_state()}.items()
        }

    def account(self, client: str) -> Account:
        trainer, meter = self.clients[client], self._model(client).link.meter
        personal = sum(value.numel() for value in self._model(client).personal_state().values())
        return Account(
            personal_parameters=personal,
            training=meter.training,
            evaluation=meter.evaluation,
            client_seconds=trainer.seconds - meter.training.waited_seconds,
            server_seconds=meter.training.server_seconds,
            gradient_evaluations=trainer.steps,
        )

    def server_facts(self) -> dict[str, float]:
        shared = self.server.shared
        return {
            "parameters": sum(value.numel() for value in shared.stage.model.parameters()),
            "trained_parameters": sum(value.numel() for value in shared.updater.parameters.values()),
            "updates": shared.version,
            "compute_seconds": self.server.compute_seconds,
        }

    def state(self) -> State:
        state = {"server": self.server.state()}
        return state | {f"client-{name}": party_state(trainer) for name, trainer in self.clients.items()}

    def load(self, state: State) -> None:
        self.server.load(state["server"])
        for name, trainer in self.clients.items():
            load_party(trainer, state[f"client-{name}"])

    def close(self) -> None:
        for name in self.clients:
            self._model(name).link.close()

    def _model(self, client: str) -> SplitModel:
        model = self.clients[client].model
        assert isinstance(model, SplitModel)
        return model

    def _make_server(self) -> Server:
        world, config = self.world, self.world.config
        start = config.model.base_depth
        if start is None:
            start = min(cut[0] for cut in world.cuts.values())
        stop = max(cut[1] for cut in world.cuts.values())
        stage = carve(world.source, Part.server(start, stop))
        tuning = config.server.tuning or config.model.tuning
        tune(stage, tuning, lora=config.model.lora, seed=config.seed)
        return Server(
            stage,
            tuning=tuning,
            lora=config.model.lora,
            config=config.server,
            optimizer=config.train.shared,
            total_steps=world.total_steps * len(world.participants),
            seed=config.seed,
        )

    def _make_stage(self, world: World, cut: tuple[int, int]) -> Stage:
        return own_stage(world, Part.client(cut, self.world.source.anatomy.blocks))

    def _make_client(self, name: str) -> Trainer:
        world = own_world(self.world, name)
        config, cut = world.config, world.cuts[name]
        stage = self._make_stage(world, cut)
        kind = world.federation.task.model_kind
        model = split_model(config, stage, cut, self.connect(name), kind, codec=config.link.codec)
        return make_trainer(world, name, model, stage)
