"""Local only: every client trains the whole model on its own data and talks to nobody. The first baseline.

It needs a device that holds all blocks with their gradients and optimiser states, which is just what FlexP's clients
do not have; data, batches, steps and optimiser are FlexP-SFL's.
"""

from __future__ import annotations

from torch import Tensor

from flexp.client.personal import WholeModel
from flexp.client.personal_head import Choice
from flexp.client.trainer import Trainer
from flexp.links.base import Traffic
from flexp.links.sums import InOnePlace
from flexp.methods.base import Account, Forward, Method, OnStep, State, World
from flexp.methods.parties import make_trainer, meet_at, own_stage, seat_of
from flexp.methods.turns import turns
from flexp.models.anatomy import Part


class Local(Method):
    """Every client trains the whole model on its own data alone."""

    name = "local"
    meets = True

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.clients = {data.name: self._make_client(data.name) for data in world.federation.clients}

    def train_round(self, number: int, on_step: OnStep) -> None:
        config = self.world.config
        for name in turns(self.world.participant_names, config.train, config.seed, number):
            on_step(self.clients[name].step())

    def meet(self, meeting: int) -> dict[str, Choice]:
        """Each with itself alone: its class statistics are all that there are."""
        choices: dict[str, Choice] = {}
        config, method = self.world.config, self.world.config.method
        meet = method.meet.model_copy(update={"min_examples": 1, "noise": 0.0})  # there is nobody to hide anything from
        config = config.model_copy(update={"method": method.model_copy(update={"meet": meet})})
        for name in self.world.participant_names:
            trainer = {name: self.clients[name]}
            seat, alone = {name: seat_of(self.clients[name], config)}, {name: InOnePlace([name])}
            choices |= meet_at(seat, alone, trainer, meeting)
        return choices

    def personal(self, client: str) -> Forward:
        return self.clients[client].personal

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.clients[client].model.personal_state().items()}

    def account(self, client: str) -> Account:
        trainer = self.clients[client]
        personal = sum(value.numel() for value in trainer.model.personal_state().values())
        return Account(personal, Traffic(), Traffic(), trainer.seconds, 0.0, trainer.steps)

    def state(self) -> State:
        return {f"client-{name}": trainer.state() for name, trainer in self.clients.items()}

    def load(self, state: State) -> None:
        for name, trainer in self.clients.items():
            trainer.load(state[f"client-{name}"])

    def _make_client(self, name: str) -> Trainer:
        stage = own_stage(self.world, Part.whole(self.world.source.anatomy.blocks))
        return make_trainer(self.world, name, WholeModel(stage), stage)
