"""What federated averaging and everything built on it have in common: download → local steps → upload → average.

*Weights*: what ``model.tuning`` trains is what travels and what is averaged, weighted by training examples; every
participant takes part in every round, and absent clients are scored with the average. *Optimiser*:
``train.personal`` for all local steps, its schedule going on across rounds. Its state is fresh each round for weights
that were averaged in between, since it belongs to weights that are gone, and lasts for personal ones. *Budget*:
``train.steps_per_round`` gradient evaluations of a client in a round, on FlexP-SFL's batches in their order
(``method.budget``). *Bytes*: the sizes of the tensors that travel, each way, every round. The newest average, fetched
for scoring alone, counts as evaluation. *Seconds*: a client's whole turn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexp.client.averaging import Mean
from flexp.client.meeting import FIRST, Seat, together
from flexp.client.personal_head import Choice
from flexp.client.trainer import Step
from flexp.config import OptimizerConfig
from flexp.cost.clock import Schedule
from flexp.data.types import ClientData
from flexp.errors import ConfigError
from flexp.links.base import Meter
from flexp.links.sums import InOnePlace
from flexp.methods.base import Account, Forward, Method, OnStep, State, World
from flexp.methods.harness import Harness, Weights, Worker, optimizer_state, size
from flexp.methods.parties import client_seed, own_stage
from flexp.models.anatomy import Part
from flexp.models.stage import Stage


@dataclass
class Client:
    """One client between its turns: plain tensors and counts.

    Attributes:
        share: of all participants' training examples; 0 of an absent client.
        workers: its loops, one for every model that it trains.
        kept: groups of tensors that never leave it; ``met``: the classifier that it has since the last meeting.
        version: of the average that it has.
        adapted: gradient evaluations of its last adaptation for scoring (:meth:`Federated.adapt`).
    """

    name: str
    share: float
    workers: dict[str, Worker]
    kept: dict[str, dict[str, Tensor]]
    meter: Meter = field(default_factory=Meter)
    version: int = 0
    seconds: float = 0.0
    adapted: int = 0
    adapted_seconds: float = 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything that :meth:`load` needs, as flat named tensors."""
        flat = {"version": torch.tensor(self.version), "adapted": torch.tensor(self.adapted)}
        flat |= {"seconds": exact(self.seconds), "adapted_seconds": exact(self.adapted_seconds)}
        for group, tensors in self.kept.items():
            flat |= {f"kept/{group}/{name}": value for name, value in tensors.items()}
        for model, worker in self.workers.items():
            flat |= {f"worker/{model}/{name}": value for name, value in worker.state().items()}
        return flat | self.meter.tensors()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.version, self.adapted = int(state["version"]), int(state["adapted"])
        self.seconds, self.adapted_seconds = float(state["seconds"]), float(state["adapted_seconds"])
        for group in self.kept:
            self.kept[group] = {name: value.clone() for name, value in within(state, f"kept/{group}/").items()}
        for model, worker in self.workers.items():
            worker.load(within(state, f"worker/{model}/"))
        self.meter.load_tensors(state)


class Averaging:
    """The server: the global weights, and the weighted mean of what comes in, as over a network."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.version = 0
        self.seconds = 0.0
        self._mean = Mean()

    def receive(self, weights: Weights, share: float) -> None:
        """Add a client's weights; the shares of a round sum to 1."""
        began = time.perf_counter()
        self._mean.add(weights, share)
        self.seconds += time.perf_counter() - began

    def finish(self, beta: float = 1.0) -> None:
        """global ← (1 − β) global + β mean."""
        began = time.perf_counter()
        for name, mean in self._mean.take().items():
            old = self.weights[name]
            self.weights[name] = ((1.0 - beta) * old.double() + beta * mean.to(old.device)).to(old.dtype)
        self.version += 1
        self.seconds += time.perf_counter() - began


class Federated(Method):
    """Federated averaging; methods override what is different about them.

    Attributes:
        scored_with_average: whether personal models hold the newest average, which clients must then fetch.
        adapts: whether a personal model is the average after local steps, all of it the client's own.
        beta: of the server's mixing.
    """

    sends: ClassVar[str] = "weights"
    timing: ClassVar[Schedule | None] = Schedule("synchronous")
    meets = True
    scored_with_average = True
    adapts = False
    beta = 1.0

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.per_round, self.rounds = world.config.train.steps_per_round, world.config.train.rounds
        self.equal_budget = world.config.method.budget == "equal"
        self.harness = self.make_harness(own_stage(self.world, Part.whole(world.source.anatomy.blocks)))
        self.shared = frozenset(name for name in self.harness.parameters if self.is_shared(name))
        self.server = self.make_server(self.harness.take(self.shared))
        everything = sum(len(data.train) for data in world.participants)
        self.clients = {data.name: self._make_client(data, everything) for data in world.federation.clients}
        self.participants = [self.clients[data.name] for data in world.participants]
        if world.meets.last:
            self.same_for_all = False  # type: ignore[misc]

    # What methods override.

    def make_harness(self, stage: Stage) -> Harness:
        """The modules that all clients train."""
        return Harness(stage)

    def make_server(self, weights: Weights) -> Averaging:
        """The server, whose average begins as ``weights``."""
        return Averaging(weights)

    def received_by(self, client: Client) -> Weights:
        """What of the average a client gets."""
        return self.server.weights

    def bytes_of(self, client: Client, weights: Weights) -> int:
        """What averaged weights cost on the way between a client and the server."""
        return size(weights)

    def is_shared(self, name: str) -> bool:
        """Whether a trained parameter is averaged; all others are personal."""
        return True

    def order(self, number: int) -> list[Client]:
        """Who trains in round ``number``, one after the other."""
        return self.participants

    def evaluations(self) -> dict[str, int]:
        """A client's models by name, and how many gradient evaluations each has in the whole run."""
        return {"model": self.world.total_steps}

    def own_models(self) -> dict[str, Weights]:
        """What a client keeps to itself at the start: groups of weights, of which ``personal`` are scored."""
        return {"personal": self.harness.take(self.harness.parameters.keys() - self.shared), "optimizer": {}}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        """A client's part of round ``number``: from the average that it received to what it sends."""
        return self.local_steps(client, received, self.per_round, on_step)

    def personal_weights(self, client: Client) -> Weights:
        """The weights of a client's personal model."""
        return {**self.server.weights, **client.kept["personal"]}

    # What they share.

    def local_steps(self, client: Client, received: Weights, steps: int, on_step: OnStep) -> Weights:
        """Train the received weights and the client's own together; returns the shared ones."""
        worker, own = client.workers["model"], client.kept["personal"].keys() - self.shared
        self.harness.put({**received, **{name: client.kept["personal"][name] for name in own}})
        with worker.optimiser(self.harness.parameters, client.kept["optimizer"]) as updater:
            for _ in range(steps):
                on_step(worker.step())
            if own:
                client.kept["optimizer"] = optimizer_state(updater, own)
        if own:
            client.kept["personal"] = self.harness.take(own)
        return self.harness.take(self.shared)

    def adapt(
        self, client: Client, steps: int, optimizer: OptimizerConfig | None = None, *, anew: bool = False
    ) -> Weights:
        """The average after ``steps`` more local steps, which move nothing that training goes on from.

        They have a new optimiser, whose rate goes on with the run's schedule, or ``anew`` through one of their own.
        Every time for the same round it takes the same batches and random numbers: the client's next ones. A device
        does this once, when training is over, so only the last adaptation is on its account.
        """
        start = {**self.server.weights, **client.kept["personal"]}
        if not self.server.version:
            return start
        began = time.perf_counter()
        worker = client.workers["model"].fork(steps if anew else None)
        self.harness.put(start)
        with (
            torch.enable_grad(),
            worker.optimiser(self.harness.parameters, config=optimizer),
        ):  # whoever scores has it off
            for _ in range(steps):
                worker.step()
        client.adapted, client.adapted_seconds = steps, time.perf_counter() - began
        return self.harness.take()

    def train_round(self, number: int, on_step: OnStep) -> None:
        for client in self.order(number):
            received = self.received_by(client)
            client.version = self.server.version
            client.meter.training.bytes_down += self.bytes_of(client, received)
            began, outside = time.perf_counter(), 0.0

            def report(step: Step) -> None:
                nonlocal outside
                left = time.perf_counter()
                on_step(step)
                outside += time.perf_counter() - left

            sent = self.turn(client, received, number, report)
            client.seconds += time.perf_counter() - began - outside
            client.meter.training.bytes_up += self.bytes_of(client, sent)
            client.meter.training.exchanges += 1
            self.server.receive(sent, client.share)
        self.server.finish(self.beta)
        self.harness.holds = None

    def meet(self, meeting: int) -> dict[str, Choice]:
        """The first classifier goes where any model of a client has one; the last is each client's own from then on."""
        table = InOnePlace([client.name for client in self.participants])
        seats = {client.name: self._seat(client) for client in self.participants}
        adders = dict.fromkeys(seats, table)
        choices: dict[str, Choice] = dict.fromkeys(seats, "closed-form")
        if meeting == FIRST:
            weights = together({name: seat.first() for name, seat in seats.items()}, adders, meeting)
            common = next(iter(weights.values()))
            self.server.weights |= {name: value for name, value in common.items() if name in self.server.weights}
            for client in self.clients.values():
                for group in client.kept.values():
                    group.update({name: value.clone() for name, value in common.items() if name in group})
        else:
            for name, (own, choice) in together({n: seat.last() for n, seat in seats.items()}, adders, meeting).items():
                self.clients[name].kept["met"], choices[name] = own, choice
        for client in self.participants:
            traffic = client.meter.training
            traffic.bytes_up, traffic.bytes_down = traffic.bytes_up + table.bytes, traffic.bytes_down + table.bytes
            client.seconds += seats[client.name].seconds
        self.harness.holds = None
        self.rare = max(seat.rare for seat in seats.values())
        return choices

    def personal(self, client: str) -> Forward:
        def forward(batch: Mapping[str, Tensor]) -> Any:
            self._hold(self.clients[client])
            self.harness.train(False)
            with torch.no_grad():
                return self.harness(**batch)

        return forward

    def trained_weights(self, client: str) -> Weights:
        self._hold(self.clients[client])
        return self.harness.take()

    def account(self, client: str) -> Account:
        found = self.clients[client]
        own = found.kept["personal"] | (self.server.weights if self.adapts else {})
        if client in self.world.absent:
            own = {name: value for name, value in found.kept["personal"].items() if name not in self.server.weights}
        return Account(
            personal_parameters=sum(value.numel() for value in (own | found.kept["met"]).values()),
            training=found.meter.training,
            evaluation=found.meter.evaluation,
            client_seconds=found.seconds + found.adapted_seconds,
            server_seconds=0.0 if client in self.world.absent else self.server.seconds / len(self.participants),
            gradient_evaluations=sum(worker.steps for worker in found.workers.values()) + found.adapted,
        )

    def server_facts(self) -> dict[str, float]:
        numbers = sum(value.numel() for value in self.server.weights.values())
        return {
            "parameters": numbers,
            "trained_parameters": numbers,
            "updates": self.server.version,
            "compute_seconds": self.server.seconds,
        }

    def state(self) -> State:
        server = {f"global/{name}": value for name, value in self.server.weights.items()}
        server |= {"version": torch.tensor(self.server.version), "seconds": exact(self.server.seconds)}
        return {"server": server} | {f"client-{name}": client.state() for name, client in self.clients.items()}

    def load(self, state: State) -> None:
        server = state["server"]
        self.server.weights = {name: server[f"global/{name}"].clone() for name in self.server.weights}
        self.server.version, self.server.seconds = int(server["version"]), float(server["seconds"])
        for name, client in self.clients.items():
            client.load(state[f"client-{name}"])
        self.harness.holds = None

    def half_of_round(self, wanted: int | None, setting: str) -> tuple[int, int]:
        """A round's gradient evaluations divided between two phases or models: (the second's, the first's).

        ``wanted`` are the first's. With an equal budget they are taken out of the round's, half of them (the larger,
        if odd) when nothing else is said; otherwise they come on top.

        Raises:
            ConfigError: nothing is left for the second.
        """
        if not self.equal_budget:
            return self.per_round, wanted or self.per_round
        first = wanted or self.per_round - self.per_round // 2
        if first >= self.per_round:
            raise ConfigError(
                f"method.{setting}: {first} of train.steps_per_round = {self.per_round} leave no step for the averaged "
                "weights; use more steps a round, or method.budget = 'paper'"
            )
        return self.per_round - first, first

    def _hold(self, client: Client) -> None:
        if self.harness.holds == client.name:
            return
        absent = client.name in self.world.absent
        if (self.scored_with_average or absent) and client.version < self.server.version:
            client.meter.evaluation.bytes_down += self.bytes_of(client, self.received_by(client))
            client.meter.evaluation.exchanges += 1
            client.version = self.server.version
        weights = {**client.kept["personal"], **self.received_by(client)} if absent else self.personal_weights(client)
        self.harness.put({**weights, **client.kept["met"]}, holds=client.name)

    def _seat(self, client: Client) -> Seat:
        config = self.world.config
        train = next(data.train for data in self.world.participants if data.name == client.name)
        task, forward = self.world.federation.task, self.personal(client.name)
        return Seat(train, task, self.harness.stage.model, forward, config, client_seed(config.seed, client.name))

    def _make_client(self, data: ClientData, everything: int) -> Client:
        world, seed = self.world, client_seed(self.world.config.seed, data.name)
        workers = {
            name: Worker(data, world.federation.task, self.harness, world.config.train, seed=seed, total=total)
            for name, total in self.evaluations().items()
        }
        share = 0.0 if data.name in world.absent else len(data.train) / everything
        return Client(data.name, share, workers, {**self.own_models(), "met": {}})


def exact(value: float) -> Tensor:
    """A number that comes back as it was."""
    return torch.tensor(value, dtype=torch.float64)


def within(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def spread(total: int, rounds: int, number: int) -> int:
    """How many of ``total`` fall to round ``number`` (1, 2, …), as evenly as whole numbers can be."""
    return number * total // rounds - (number - 1) * total // rounds
