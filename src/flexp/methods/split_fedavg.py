"""Split learning with averaged clients: a U-shaped split whose head and tail are averaged (after SplitFed).

Every client keeps embeddings, blocks [0, s), blocks [e, L), final norm and head; labels stay at home, and the server
trains the shared middle [s, e) with every client's gradient as it arrives, as in FlexP-SFL without alignment
(:mod:`flexp.methods.split`). All have one cut, the smallest s and the largest e of the clients' cuts. After every
round

    head and tail ← Σ n_k/n · (head and tail)_k

This is SplitFed (Thapa et al., AAAI 2022, arXiv 2004.12088) in the U-shape that keeps labels private (Vepakomma et al.,
2018, arXiv 1812.00564). The clients' optimisers are fresh each round, the server's lasts. The personal model is the
average around the middle. With one client and one round it is local training (clipping off, since it is per party).

Budget: exact. Bytes: activations and gradients as the link meters them; head and tail both ways every round. The newest
average, fetched for scoring alone, counts as evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch

from flexp.config import RunConfig
from flexp.cost.clock import Schedule
from flexp.methods.base import (
    RATIO,
    Account,
    Axis,
    Cuts,
    Deployed,
    Forward,
    OnStep,
    State,
    World,
    without_alignment,
)
from flexp.methods.harness import size
from flexp.methods.parties import renew
from flexp.methods.ranks import average, fit
from flexp.methods.split import Split


class SplitFedAvg(Split):
    """Split learning with one cut, without alignment; the clients' ends are averaged after each round."""

    name = "split-fedavg"
    sends: ClassVar[str] = "activations, gradients, weights"
    timing: ClassVar[Schedule | None] = Schedule("split-sync")
    axis: ClassVar[Axis | None] = (RATIO, (1.0, 0.25))
    deployed: ClassVar[Deployed | None] = Deployed(averages=True)

    @classmethod
    def cuts(cls, config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> Cuts:
        starts, stops = zip(*cuts.values(), strict=True)
        return dict.fromkeys(cuts, (min(starts), max(stops)))

    def __init__(self, world: World) -> None:
        super().__init__(self.prepared(replace(world, config=without_alignment(world.config))))
        self.examples = {data.name: len(data.train) for data in world.participants}
        self.version = 0
        self.averaging_seconds = 0.0
        self.has = dict.fromkeys(self.clients, 0)  # the version of the average that a client has

    def prepared(self, world: World) -> World:
        """The world with the cuts that this method uses."""
        return replace(world, cuts=self.cuts(world.config, world.cuts, world.source.anatomy.blocks))

    def train_round(self, number: int, on_step: OnStep) -> None:
        for name in self.examples:
            self._model(name).link.meter.training.bytes_down += size(self._model(name).personal_state())
            self.has[name] = self.version
        super().train_round(number, on_step)
        self._average()

    def personal(self, client: str) -> Forward:
        forward, model = super().personal(client), self._model(client)

        def fetched(batch: object) -> object:
            if self.has[client] < self.version:
                model.link.meter.evaluation.bytes_down += size(model.personal_state())
                model.link.meter.evaluation.exchanges += 1
                self.has[client] = self.version
            return forward(batch)  # type: ignore[arg-type]

        return fetched

    def account(self, client: str) -> Account:
        account = super().account(client)
        averaging = self.averaging_seconds / len(self.examples) if client in self.examples else 0.0
        return replace(account, personal_parameters=0, server_seconds=account.server_seconds + averaging)

    def server_facts(self) -> dict[str, float]:
        facts = super().server_facts()
        return {**facts, "compute_seconds": facts["compute_seconds"] + self.averaging_seconds}

    def state(self) -> State:
        state = super().state()
        for name, version in self.has.items():
            state[f"client-{name}"]["version"] = torch.tensor(version)
        state["server"]["average-version"] = torch.tensor(self.version)
        state["server"]["averaging_seconds"] = torch.tensor(self.averaging_seconds, dtype=torch.float64)
        return state

    def load(self, state: State) -> None:
        super().load(state)
        self.has = {name: int(state[f"client-{name}"]["version"]) for name in self.has}
        self.version = int(state["server"]["average-version"])
        self.averaging_seconds = float(state["server"]["averaging_seconds"])

    def _average(self) -> None:
        """Average what participants hold; everybody, absent clients too, gets what it has a place for."""
        parts = {name: self._model(name).personal_state() for name in self.examples}
        for name, part in parts.items():
            traffic = self._model(name).link.meter.training
            traffic.bytes_up += size(part)
            traffic.exchanges += 1
        began = time.perf_counter()
        means = average(parts, self.examples)
        self.version += 1
        self.averaging_seconds += time.perf_counter() - began
        for trainer in self.clients.values():
            own = trainer.updater.parameters
            with torch.no_grad():
                for name, parameter in own.items():
                    if name in means:
                        parameter.copy_(fit(means[name], parameter.shape))
            renew(trainer, self.world.config)
