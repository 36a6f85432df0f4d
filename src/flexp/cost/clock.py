"""A virtual clock: what a run's measured work would take on its clients' devices.

A discrete-event simulation (simpy). Every client is a process that computes, sends, receives and waits; the server's
attention is a resource that clients queue for, first come, first served. The schedules, one of which a method has:

- ``synchronous``: download weights → local steps → upload them; the round ends when the last upload is there.
- ``alone``: local steps only, nobody talks.
- ``split-async``: every step is head → upload → queue and server → download → tail → upload of the gradient → queue and
  server → download → head backward. Nobody waits for anybody; a round is over when the last client has had its turn.
- ``split-sync``: such steps between a download of weights and an upload of them, with the end of a round in common.

A message takes both ends' latencies, and its bits over the slower of the sender's uplink and the receiver's downlink.
A client that is away rests: what it was doing goes on when it is back. The server is always there. Averaging,
optimiser steps and a server link that many fill at once cost nothing here.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import simpy

from flexp.cost.choice import ExchangeCost
from flexp.cost.profile import Profile
from flexp.rng import generator

Kind = Literal["synchronous", "alone", "split-async", "split-sync"]
Process = Generator[Any, Any, None]


@dataclass(frozen=True)
class Schedule:
    """How clients and server take turns.

    Attributes:
        kind: which of the schedules above.
        one_at_a_time: one client's steps of a round come after another's; nobody steps before who came first is done.
        together: every step is one of all clients, which have equally many; the server begins when the last one's
            activations are there.
        pull_every: steps after which a client fetches shared weights; 0: never.
        average_every: rounds between two averages of weights.
    """

    kind: Kind
    one_at_a_time: bool = False
    together: bool = False
    pull_every: int = 0
    average_every: int = 1

    @property
    def averages(self) -> bool:
        """Whether clients exchange weights with the server, and end each round together."""
        return self.kind in ("synchronous", "split-sync")


SYNCHRONOUS, ALONE = Schedule("synchronous"), Schedule("alone")
SPLIT_ASYNC, SPLIT_SYNC = Schedule("split-async"), Schedule("split-sync")


@dataclass(frozen=True)
class ClientWork(ExchangeCost):
    """What one client does in a run.

    Attributes:
        steps: in each round.
        begun: steps that it had done before these.
        pull_every: steps after which ``pull_down`` is fetched; 0: never.
        weights_down, weights_up: bytes of an average.
        weights_every: rounds between two averages.
        final: the client's operations when training is over. The newest average, which it fetches for them, is on
            nobody's account: it is what all averaging methods are scored with.
    """

    steps: Sequence[int] = ()
    begun: int = 0
    pull_every: int = 0
    weights_down: float = 0.0
    weights_up: float = 0.0
    weights_every: int = 1
    final: float = 0.0


@dataclass
class ClientTime:
    """Where a client's virtual seconds went, until it was ``finished``. ``waiting``: for the server or for others."""

    computing: float = 0.0
    transmitting: float = 0.0
    waiting: float = 0.0
    offline: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True)
class Virtual:
    """What came out.

    Attributes:
        rounds: the virtual second at which what each round is scored with was there: its end, and with
            :attr:`ClientWork.final` the adaptation that would follow if training ended there.
        clients: by name.
    """

    rounds: list[float]
    clients: dict[str, ClientTime]


def simulate(
    schedule: Schedule,
    work: Mapping[str, ClientWork],
    devices: Mapping[str, Profile],
    server: Profile,
    *,
    slots: int = 1,
    seed: int = 0,
) -> Virtual:
    """Let the clocks run. Equal arguments give equal times.

    Args:
        slots: requests that the server works on at once, each at its full speed.
        seed: of the periods in which devices are away.
    """
    rounds = len(next(iter(work.values())).steps)
    simulation = _Simulation(schedule, rounds, len(work), server, slots)
    clients = [_Client(simulation, name, work[name], devices[name], seed) for name in work]
    for client in clients:
        simulation.env.process(client.live())
    simulation.env.run()
    return Virtual(simulation.ends, {client.name: client.time for client in clients})


class _Simulation:
    """What all clients share: the clock, the server's attention, and the ends of rounds."""

    def __init__(self, schedule: Schedule, rounds: int, clients: int, server: Profile, slots: int) -> None:
        self.env = simpy.Environment()
        self.schedule, self.rounds, self.server = schedule, rounds, server
        self.attention = simpy.Resource(self.env, capacity=slots)
        self.turn = simpy.Resource(self.env, capacity=1 if schedule.one_at_a_time else clients)
        self._clients, self._arrived = clients, 0
        self._all_there = self.env.event()
        self.ends = [0.0] * rounds
        self._missing = [clients] * rounds
        self._over = [self.env.event() for _ in range(rounds)]

    def arrive(self, number: int) -> Any:
        """A client is through with round ``number``; gives the event that all are."""
        self._missing[number] -= 1
        self.ends[number] = max(self.ends[number], self.env.now)
        if not self._missing[number]:
            self._over[number].succeed()
        return self._over[number]

    def join(self) -> Any:
        """A client's part of a common step is there; gives the event that all are."""
        there = self._all_there
        self._arrived += 1
        if self._arrived == self._clients:
            self._arrived, self._all_there = 0, self.env.event()
            there.succeed()
        return there


@dataclass
class _Client:
    simulation: _Simulation
    name: str
    work: ClientWork
    device: Profile
    seed: int
    time: ClientTime = field(default_factory=ClientTime)
    done: int = 0

    def __post_init__(self) -> None:
        self.presence = _Presence(self.device, self.seed, self.name)

    def live(self) -> Process:
        simulation, work = self.simulation, self.work
        averages = simulation.schedule.averages
        for number in range(simulation.rounds):
            if averages and number % work.weights_every == 0:
                yield from self.receive(work.weights_down)
            with simulation.turn.request() as turn:
                yield from self.wait(turn)
                for _ in range(work.steps[number]):
                    yield from self.step()
            if averages and (number + 1) % work.weights_every == 0:
                yield from self.send(work.weights_up)
            over = simulation.arrive(number)
            if averages:
                yield from self.wait(over)
            if work.final and number + 1 < simulation.rounds:
                simulation.ends[number] = max(simulation.ends[number], self.adapted())
        if work.final:
            yield from self.compute(work.final)
            simulation.ends[-1] = max(simulation.ends[-1], simulation.env.now)
        self.time.finished = simulation.env.now

    def adapted(self) -> float:
        """When the adaptation would be done if training ended now; nothing moves."""
        presence, now = copy.deepcopy(self.presence), self.simulation.env.now
        seconds = self.work.final / self.device.flops
        return float(now + seconds + presence.away(now, seconds))

    def step(self) -> Process:
        work = self.work
        if self.simulation.schedule.kind in ("synchronous", "alone"):
            yield from self.compute(work.before * work.exchanges)
            return
        known = work.later_up is not None and self.done >= work.epoch
        for exchange in range(work.exchanges):
            yield from self.compute(work.later_before if known else work.before)
            yield from self.send(work.later_up if known and work.later_up is not None else work.forward_up)
            if self.simulation.schedule.together and not exchange:
                yield from self.wait(self.simulation.join())
            if work.combined:
                yield from self.be_served(work.server_forward + work.server_backward)
            else:
                yield from self.be_served(work.server_forward)
                yield from self.receive(work.forward_down)
                yield from self.compute(work.between)
                yield from self.send(work.backward_up)
                yield from self.be_served(work.server_backward)
            yield from self.receive(work.backward_down)
            yield from self.compute(work.after)
        self.done += 1
        if work.pull_every and (work.begun + self.done) % work.pull_every == 0:
            yield from self.send(0.0)
            yield from self.receive(work.pull_down)

    def compute(self, flops: float) -> Process:
        yield from self.busy(flops / self.device.flops, "computing")

    def send(self, size: float) -> Process:
        rate = min(self.device.uplink_bps, self.simulation.server.downlink_bps)
        yield from self.busy(self.latency + 8 * size / rate, "transmitting")

    def receive(self, size: float) -> Process:
        yield from self.busy(self.download(size), "transmitting")

    def download(self, size: float) -> float:
        """Seconds of a message from the server."""
        return self.latency + 8 * size / min(self.device.downlink_bps, self.simulation.server.uplink_bps)

    @property
    def latency(self) -> float:
        return self.device.latency_s + self.simulation.server.latency_s

    def busy(self, seconds: float, account: str) -> Process:
        """Do something of one's own for so long, not counting when the device is away."""
        away = self.presence.away(self.simulation.env.now, seconds)
        setattr(self.time, account, getattr(self.time, account) + seconds)
        self.time.offline += away
        yield self.simulation.env.timeout(seconds + away)

    def be_served(self, flops: float) -> Process:
        began = self.simulation.env.now
        with self.simulation.attention.request() as turn:
            yield turn
            yield self.simulation.env.timeout(flops / self.simulation.server.flops)
        self.time.waiting += self.simulation.env.now - began

    def wait(self, event: Any) -> Process:
        began = self.simulation.env.now
        yield event
        self.time.waiting += self.simulation.env.now - began


class _Presence:
    """When a device is there: alternating exponential periods, from a generator of the client's own."""

    def __init__(self, device: Profile, seed: int, client: str) -> None:
        self.on, self.off = device.mean_on_s or 0.0, device.mean_off_s or 0.0
        if self.off:
            self._random = generator(seed, "availability", client)
            self.there = bool(self._random.random() < self.on / (self.on + self.off))
            self.until = self._period()

    def away(self, now: float, seconds: float) -> float:
        """How long the device is away while ``seconds`` of work are done from ``now`` on, which never goes back."""
        if not self.off:
            return 0.0
        away, time, left = 0.0, now, seconds
        while True:
            while self.until <= time:
                self.there = not self.there
                self.until += self._period()
            if self.there and time + left <= self.until:
                return away
            if self.there:
                left -= self.until - time
            else:
                away += self.until - time
            time = self.until

    def _period(self) -> float:
        return float(self._random.exponential(self.on if self.there else self.off))
