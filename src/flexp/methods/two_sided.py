"""What L-shaped split methods have in common: one cut s, labels on the server, clients' parts averaged.

The client has the embeddings and blocks [0, s), the server the other blocks, final norm, head, **and the labels**:
clients send them with every batch. That is how these methods are defined; FlexP's own split keeps labels at home.

*Cut*: one for all, the smallest s of the clients' cuts, so that it fits every device, or as the method's ``cut`` says.
*Optimisers*: ``train.personal`` on the client's side, ``train.shared`` on the server's, each with its own schedule and
clipping; the head, where it is new, has ``train.shared.new_lr`` or, without, ``train.personal.new_lr``, since that is
the rate of a new head wherever it is. Whatever was averaged begins the next round with a fresh optimiser; what the
server alone keeps has one that lasts. *Bytes*: what crosses at the cut (:mod:`flexp.methods.split_bench`), and the
client's part down and up wherever it is averaged. Scoring sends activations up and logits down. *Seconds*: apart for
the two sides.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from flexp.config import RunConfig, Section
from flexp.cost.clock import Schedule
from flexp.errors import ConfigError
from flexp.methods.base import RATIO, Account, Axis, Cuts, Holds, OnStep, State, World
from flexp.methods.federated import Client, Federated, within
from flexp.methods.split_bench import SplitBench
from flexp.methods.workbench import Weights, size
from flexp.models.parts import check_cut
from flexp.models.stage import Stage
from flexp.optim import Updater


class TwoSided(Federated):
    """Federated averaging of one side of a split, or of both.

    Attributes:
        together: whether one step of the server is one of all clients.
        copies: of its side that the server trains.
        lasting: trains what is never averaged, where it is: in the bench.

    Raises:
        ConfigError: the cut does not fit the model, or would send bare embeddings unasked.
    """

    sends: ClassVar[str] = "activations, labels, weights"
    held = Holds("start")
    timing: ClassVar[Schedule] = Schedule("split-sync")
    axis: ClassVar[Axis | None] = (RATIO, (1.0, 0.25))

    class Config(Section):
        """The one cut of an L-shaped split, the same for all clients."""

        cut: Annotated[int, Field(ge=0)] | None = None  # s; None: the smallest s of the clients

    bench: SplitBench
    together = False
    copies = 1

    @classmethod
    def cuts(cls, config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> Cuts:
        """One for all: s as the method's ``cut`` says, else the smallest of the clients', so that it fits everybody."""
        settings: TwoSided.Config = cls.own(config)
        wanted = min(start for start, _ in cuts.values()) if settings.cut is None else settings.cut
        start, _ = check_cut((wanted, None), blocks, where=f"method {cls.name}: cut")
        if start == 0 and not config.model.expose_embeddings:
            raise ConfigError(
                f"method {cls.name}: with a cut of 0 the clients would send their embeddings as they are, from which "
                "the server can read every token; use 1 or more, or set model.expose_embeddings = true if that is "
                "acceptable"
            )
        return dict.fromkeys(cuts, (start, blocks))

    def __init__(self, world: World) -> None:
        cuts = self.cuts(world.config, world.cuts, world.source.anatomy.blocks)
        self.cut = next(iter(cuts.values()))[0]
        super().__init__(world)
        own = frozenset(self.bench.parameters.keys() - self.shared)
        self.server_steps = world.total_steps * (1 if self.together else len(world.participants))
        self.lasting = self.server_updater(own, self.server_steps)
        self.updates = 0

    def make_bench(self, stage: Stage) -> SplitBench:
        return SplitBench(stage, self.cut)

    def is_shared(self, name: str) -> bool:
        return name in self.bench.client_side

    def own_models(self) -> dict[str, Weights]:
        return {"personal": {}, "optimizer": {}}

    def bytes_of(self, client: Client, weights: Weights) -> int:
        return size({name: value for name, value in weights.items() if name in self.bench.client_side})

    def side(self, names: frozenset[str]) -> dict[str, nn.Parameter]:
        """The parameters ``names`` of the bench, such as one side's, by name."""
        return {name: value for name, value in self.bench.parameters.items() if name in names}

    def server_updater(self, names: frozenset[str], total: int) -> Updater:
        """A new optimiser of the server's, for the parameters ``names``."""
        config, personal = self.world.config.train.shared, self.world.config.train.personal
        if config.new_lr is None:  # these methods' head is the server's; others' is the client's
            config = config.model_copy(update={"new_lr": personal.new_lr})
        return Updater(self.side(names), config, total, self.bench.stage.new)

    def split_steps(self, client: Client, server: Updater, on_step: OnStep) -> None:
        """A client's turn: each of its steps is one of ``server`` as well."""
        worker, traffic = client.workers["model"], client.meter.training
        self.bench.meter = client.meter

        def update() -> None:
            began = time.perf_counter()
            server.step()
            self.updates += 1
            traffic.server_seconds += time.perf_counter() - began

        with worker.optimiser(self.side(self.bench.client_side)), self.bench.before_update(update):
            for _ in range(self.per_round):
                on_step(worker.step())

    def account(self, client: str) -> Account:
        account = super().account(client)
        server_seconds = account.training.server_seconds  # the client's turn went on meanwhile
        return replace(
            account,
            personal_parameters=0,
            client_seconds=max(0.0, account.client_seconds - server_seconds),
            server_seconds=account.server_seconds + server_seconds,
        )

    def server_facts(self) -> dict[str, float]:
        meters = [client.meter for client in self.clients.values()]
        trained = sum(value.numel() for value in self.side(self.bench.server_side).values())
        crossing = sum(meter.training.server_seconds + meter.evaluation.server_seconds for meter in meters)
        return {
            "parameters": self.copies * self.bench.server_parameters,
            "trained_parameters": self.copies * trained,
            "updates": self.updates,
            "compute_seconds": self.server.seconds + crossing,
        }

    def state(self) -> State:
        state = super().state()
        server = {f"side/{name}": value.detach() for name, value in self.lasting.parameters.items()}
        server |= {f"side-optimizer/{name}": value for name, value in self.lasting.state().items()}
        return {**state, "server": {**state["server"], **server, "updates": torch.tensor(self.updates)}}

    def load(self, state: State) -> None:
        super().load(state)
        server = state["server"]
        self.bench.put(within(server, "side/"))
        self.lasting.load(within(server, "side-optimizer/"))
        self.updates = int(server["updates"])

    def _hold(self, client: Client) -> None:
        self.bench.meter = client.meter
        super()._hold(client)
