"""Closed form: no training. Clients meet once, in a linear discriminant of everybody's class sums.

Features are the pretrained model's, on which nothing is trained (:mod:`flexp.client.closed_form`). With
``method.meet.on`` each client then makes the classifier its own: its prior and its class means. What other methods are
worth is what they have above this. Bytes: the sums, up and down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexp.client.meeting import FIRST, Meets, Seat, classifier_of, closed_form_of, together
from flexp.client.personal import WholeModel
from flexp.client.personal_head import Choice
from flexp.config import RunConfig
from flexp.errors import ConfigError
from flexp.links.base import Traffic
from flexp.links.sums import InOnePlace
from flexp.methods.base import Account, Forward, Holds, Method, OnStep, State, World
from flexp.methods.parties import client_seed
from flexp.models.anatomy import Part
from flexp.models.stage import carve


class ClosedForm(Method):
    """No training: a linear discriminant of everybody's class sums on the pretrained model's features."""

    name = "closed-form"
    sends = "class sums"
    held = Holds(None)
    timing = None
    tuned = False
    effort = 0.1
    meets = True

    @classmethod
    def suits(cls, config: RunConfig) -> bool:
        return closed_form_of(config)

    @classmethod
    def meetings(cls, config: RunConfig) -> Meets:
        known = closed_form_of(config)
        return Meets(known, known and config.method.meet.on is True)

    def __init__(self, world: World) -> None:
        super().__init__(world)
        if not world.meets:
            raise ConfigError(
                f"method closed-form: {world.federation.task.name} has no closed form; use another method"
            )
        self.model = WholeModel(carve(world.source, Part.whole(world.source.anatomy.blocks)))
        path, layer = classifier_of(self.model.stage.model)
        self.names = {f"{path}.weight": layer.weight, f"{path}.bias": layer.bias}
        layer.weight, layer.bias = (nn.Parameter(value.clone(), requires_grad=False) for value in self.names.values())
        self.layer = layer
        self.heads = {data.name: dict(self.names) for data in world.federation.clients}
        self.bytes, self.seconds = 0, dict.fromkeys(self.heads, 0.0)

    def train_round(self, number: int, on_step: OnStep) -> None:
        pass

    def meet(self, meeting: int) -> dict[str, Choice]:
        names = self.world.participant_names
        seats, table = {name: self._seat(name) for name in names}, InOnePlace(names)
        adders = dict.fromkeys(names, table)
        if meeting == FIRST:
            weights = together({name: seat.first() for name, seat in seats.items()}, adders, meeting)
            for name in self.heads:  # who took no part has what all have
                self.heads[name] = weights.get(name, weights[names[0]])
        else:
            ends = together({name: seat.last(trained=False) for name, seat in seats.items()}, adders, meeting)
            self.heads |= {name: own for name, (own, _) in ends.items()}
        self.bytes += table.bytes
        for name, seat in seats.items():
            self.seconds[name] += seat.seconds
        self.rare = max(seat.rare for seat in seats.values())
        return dict.fromkeys(names, "closed-form")

    def personal(self, client: str) -> Forward:
        def forward(batch: Mapping[str, Tensor]) -> Any:
            weight, bias = (self.heads[client][name] for name in self.names)
            self.model.train(False)
            with torch.no_grad():
                self.layer.weight.copy_(weight)
                self.layer.bias.copy_(bias)
                return self.model(**batch)

        return forward

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.heads[client].items()}

    def account(self, client: str) -> Account:
        took_part = client in self.world.participant_names
        traffic = Traffic(bytes_up=self.bytes, bytes_down=self.bytes) if took_part else Traffic()
        own = sum(value.numel() for value in self.names.values()) if self.world.meets.last else 0
        return Account(own, traffic, Traffic(), self.seconds[client], 0.0)

    def state(self) -> State:
        clients = {
            f"client-{name}": {**head, "seconds": torch.tensor(self.seconds[name], dtype=torch.float64)}
            for name, head in self.heads.items()
        }
        return {"server": {"bytes": torch.tensor(self.bytes)}} | clients

    def load(self, state: State) -> None:
        self.bytes = int(state["server"]["bytes"])
        for name in self.heads:
            own = state[f"client-{name}"]
            self.heads[name] = {key: own[key].clone() for key in self.names}
            self.seconds[name] = float(own["seconds"])

    def _seat(self, name: str) -> Seat:
        config, task = self.world.config, self.world.federation.task
        train = next(data.train for data in self.world.participants if data.name == name)
        return Seat(train, task, self.model.stage.model, self.personal(name), config, client_seed(config.seed, name))
