"""What U-shaped split methods have in common: clients with both ends of the model, and one server for its middle.

Every client keeps embeddings, blocks [0, s), blocks [e, L), final norm and head, and trains them on its private data;
labels stay at home. The server trains the shared middle with every client's gradient as it arrives. With one client
and no alignment this equals training the whole model.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flexp.client.adding import OverLink
from flexp.client.model import SplitModel
from flexp.client.personal_head import Choice
from flexp.client.recut import Blocks, Move, ParkedInMemory, fit, recut
from flexp.client.trainer import Trainer, cut_in, load_party, party_state
from flexp.cost.clock import Schedule
from flexp.links.base import Link
from flexp.methods.base import RATIO, Account, Axis, Forward, Holds, Method, OnStep, State, World, base_depth
from flexp.methods.parties import make_trainer, meet_at, own_stage, own_world, seat_of, server_stage, split_model
from flexp.methods.turns import turns
from flexp.models.anatomy import Part
from flexp.server import Server


class Split(Method):
    """One server, and a personal model for each client; methods override what is different about them."""

    sends: ClassVar[str] = "activations, gradients"
    held = Holds("ends")
    timing: ClassVar[Schedule | None] = Schedule("split-async")
    axis: ClassVar[Axis | None] = (RATIO, (1.0, 4.0))
    meets = True
    own_classifiers: ClassVar[bool] = False
    """A client's classifier is its own, and never averaged."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.server = self._make_server()
        self.gone: set[str] = set()  # clients whose device cannot go on
        self.parking = {data.name: ParkedInMemory() for data in world.federation.clients}
        self.clients = {data.name: self._make_client(data.name) for data in world.federation.clients}

    def train_round(self, number: int, on_step: OnStep) -> None:
        config = self.world.config
        there = [name for name in self.world.participant_names if name not in self.gone]
        for name in turns(there, config.train, config.seed, number):
            on_step(self.clients[name].step())
        if number == config.train.rounds:
            self.server.flush()  # update = "mean" may have steps left that are fewer than mean_over

    def meet(self, meeting: int) -> dict[str, Choice]:
        there = [name for name in self.world.participant_names if name not in self.gone]
        self.server.sums.open(there)
        seats = {name: seat_of(self.clients[name], own_world(self.world, name).config) for name in there}
        for seat in seats.values():
            seat.personal = self.own_classifiers
        adders = {name: OverLink(self._model(name).link) for name in there}
        choices = meet_at(seats, adders, {name: self.clients[name] for name in there}, meeting)
        self.rare = max(seat.rare for seat in seats.values())
        return choices

    def recut(self, client: str, cut: tuple[int, int], micro_batch: int | None = None) -> Move:
        """Move a client's cut between two rounds, and change the size of its exchanges.

        Raises:
            ConfigError, LinkError: the cut does not fit the model or the server.
        """
        trainer = self.clients[client]
        done = recut(trainer, cut, self._blocks(client), self.parking[client])
        trainer.micro_batch = micro_batch or trainer.micro_batch
        return done

    def cut_of(self, client: str) -> tuple[int, int]:
        """Where a client cuts now."""
        cut: tuple[int, int] = self._model(client).cut
        return cut

    def connect(self, name: str) -> Link:
        """The link of a client."""
        return self.server.connect(name)

    def personal(self, client: str) -> Forward:
        return self.clients[client].personal

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        shared, middle = self.server.blocks_of(client), range(*self.cut_of(client))
        weights = {
            name: value for name, value in shared.updater.parameters.items() if shared.stage.block_of(name) in middle
        }
        return {
            name: value.detach().clone() for name, value in {**weights, **self._model(client).personal_state()}.items()
        }

    def account(self, client: str) -> Account:
        trainer, meter = self.clients[client], self._model(client).link.meter
        personal = sum(value.numel() for value in self._model(client).stage.trainable().values())
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
            "trained_parameters": sum(
                value.numel()
                for blocks in (self.server.own.values() or (shared,))
                for value in blocks.updater.parameters.values()
            ),
            "updates": self.server.updates,
            **({} if shared.told is None else {"told": shared.told}),
            "compute_seconds": self.server.compute_seconds,
        }

    def state(self) -> State:
        state = {"server": self.server.state()}
        for name, trainer in self.clients.items():
            gone = {"gone": torch.ones(())} if name in self.gone else {}
            state[f"client-{name}"] = party_state(trainer) | self.parking[name].state() | gone
        return state

    def load(self, state: State) -> None:
        self.server.load(state["server"])
        for name, trainer in self.clients.items():
            own = state[f"client-{name}"]
            fit(trainer, cut_in(own) or self.cut_of(name), self._blocks(name))
            load_party(trainer, own)
            self.parking[name].load(own)
        self.gone = {name for name in self.clients if "gone" in state[f"client-{name}"]}

    def close(self) -> None:
        for name in self.clients:
            self._model(name).link.close()

    def _model(self, client: str) -> SplitModel:
        model = self.clients[client].model
        assert isinstance(model, SplitModel)
        return model

    def _make_server(self) -> Server:
        world, config = self.world, self.world.config
        start, stop = base_depth(config, world.cuts), world.source.anatomy.blocks
        if not config.recut.on:
            stop = max(cut[1] for cut in world.cuts.values())
        return Server(
            server_stage(world, Part.server(start, stop)),
            tuning=config.server.tuning or config.model.tuning,
            lora=config.model.lora,
            config=config.server,
            optimizer=config.train.shared,
            total_steps=config.server.trained_by(world.total_steps, len(world.participants)),
            seed=config.seed,
            clients_tuning=config.model.tuning,
            clients_quantization=config.model.quantization,
        )

    def _blocks(self, client: str) -> Blocks:
        world = own_world(self.world, client)
        return lambda part: own_stage(world, part)

    def _make_client(self, name: str) -> Trainer:
        world = own_world(self.world, name)
        config, cut = world.config, world.cuts[name]
        stage = own_stage(world, Part.client(cut, world.source.anatomy.blocks), world.adapters(name).beside)
        kind = world.federation.task.model_kind
        model = split_model(config, stage, cut, self.connect(name), kind, codec=config.link.codec)
        return make_trainer(world, name, model, stage)
