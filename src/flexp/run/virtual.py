"""What a simulated run would have taken on its devices, in phases between which devices or cuts changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flexp.cost.choice import ExchangeCost
from flexp.cost.clock import ClientTime, ClientWork, Schedule, simulate
from flexp.cost.profile import Profile, assign
from flexp.methods.base import Account, Method, World
from flexp.report.metrics import Record
from flexp.run.costs import Costs
from flexp.run.participants import devices_at


def client_facts(
    world: World, method: Method, records: Sequence[Record]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """After training: each client's ``device`` and, of methods that have a schedule, ``client_flops`` and
    ``server_flops``; and the virtual clock's times.

    Args:
        records: the run's diary; every step in it is one gradient evaluation.

    Returns:
        Facts by client (none without devices), and ``{"rounds": [seconds], "clients": {name: {account:
        seconds}}}``; ``None`` where no client computes.
    """
    config, names = world.config, [client.name for client in world.federation.clients]
    if not config.on_devices:
        return {}, None
    devices = assign(config.devices, config.data.clients.devices(names))
    facts: dict[str, dict[str, Any]] = {name: {"device": device.name} for name, device in devices.items()}
    schedule = world.method.schedule(world.config)
    rounds = max((int(record["round"]) for record in records if record["kind"] == "round"), default=0)
    if schedule is None or not rounds:
        return facts, None
    for own in facts.values():
        own |= {"client_flops": 0.0, "server_flops": 0.0}
    taken = Counter((record["client"], int(record["round"])) for record in records if record["kind"] == "step")
    costs: dict[Any, Costs] = {}
    clock = VirtualTime(world, schedule)
    done: Counter[str] = Counter()  # steps in earlier phases
    begun: dict[str, tuple[tuple[int, int], int]] = {}  # each client's cut, and after how many steps it took it
    for phase in phases(world, records, rounds):
        now = _in_phase(world, phase)
        counted = costs.setdefault(phase.key, Costs(now))
        work = {}
        for name in phase.there:
            steps = [taken[name, number] for number in phase.rounds]
            # Metered bytes are of the whole run: where anything changed in it, the counted exchange's are taken.
            account = method.account(name) if phase.only else None
            if begun.get(name, (None, 0))[0] != phase.cuts[name]:  # other activations, which no server knows yet
                begun[name] = phase.cuts[name], done[name]
            cost = _cost(counted, method, name)
            cost = replace(cost, epoch=max(0, cost.epoch - (done[name] - begun[name][1])))  # what is left of the first
            work[name] = own_work = client_work(cost, account, steps, schedule, begun=done[name])
            known = sum(steps) - cost.sent_anew(sum(steps))
            saved = known * cost.exchanges * (cost.before - cost.later_before)
            facts[name]["client_flops"] += cost.client_step * sum(steps) + own_work.final - saved
            facts[name]["server_flops"] += cost.server_step * sum(steps)
            done[name] += sum(steps)
        clock.go_on(phase, work)
    return facts, clock.facts()


def client_work(
    cost: ExchangeCost, account: Account | None, steps: list[int], schedule: Schedule, *, begun: int = 0
) -> ClientWork:
    """A client's work for the clock: operations as counted, bytes as metered in the whole run.

    Metered bytes are spread evenly over rounds (weights) or exchanges (activations, in the proportions of the messages
    of the counted one). Where a method sends both, the weights are those that the client trains, down before and up
    after every ``schedule.average_every`` rounds. Without an ``account`` they are those of the counted exchange.

    Args:
        cost: ``epoch`` is what is left of its first epoch.
        begun: steps that it had done before these.
    """
    rounds, total = len(steps), sum(steps)
    anew = cost.sent_anew(total)
    counted_up = anew * cost.forward_up + (total - anew) * (cost.later_up or 0.0) + total * cost.backward_up
    pull_every, average_every = schedule.pull_every, schedule.average_every
    pulls = (begun + total) // pull_every - begun // pull_every if pull_every else 0
    if account is None:
        up = cost.exchanges * counted_up
        down = float(cost.exchanges * total * (cost.forward_down + cost.backward_down))
        down += cost.pull_down * pulls
    else:
        up, down = float(account.training.bytes_up), float(account.training.bytes_down)
    work = ClientWork(**vars(cost), steps=steps, begun=begun)
    if schedule.kind == "synchronous":
        extra = max(
            0, (total if account is None else account.gradient_evaluations) - total
        )  # the adaptation of a personal model, after the last round
        return replace(work, weights_up=up / rounds, weights_down=down / rounds, final=extra * cost.client_step)
    if schedule.kind == "alone" or not total:
        return work
    if schedule.kind == "split-sync":
        weights = cost.weights
        work = replace(work, weights_up=weights, weights_down=weights, weights_every=average_every)
        up = max(0.0, up - weights * (rounds // average_every))
        down = max(0.0, down - weights * math.ceil(rounds / average_every))
    if pull_every and cost.pull_down:
        work = replace(work, pull_every=pull_every)
        down = max(0.0, down - cost.pull_down * pulls)
    metered, down_each = up / cost.exchanges / counted_up, down / total / cost.exchanges
    down_known = cost.forward_down + cost.backward_down
    return replace(
        work,
        forward_up=metered * cost.forward_up,
        later_up=None if cost.later_up is None else metered * cost.later_up,
        backward_up=metered * cost.backward_up,
        forward_down=down_each * cost.forward_down / down_known,
        backward_down=down_each * cost.backward_down / down_known,
    )


def _in_phase(world: World, phase: Phase) -> World:
    """The world with the cuts and exchanges of a phase."""
    if phase.only:
        return world
    sizes, config = phase.micro_batches, world.config
    if None not in sizes.values():
        config = config.with_clients(config.data.clients.written(list(sizes), micro_batch=list(sizes.values())))
    return replace(world, config=config, cuts=dict(phase.cuts))


def _cost(costs: Costs, method: Method, client: str) -> ExchangeCost:
    """Of a client's mean step: in each phase, a part of the model may be frozen."""
    parts = [(costs.of(client, only), share) for only, share in method.phases]
    return replace(parts[0][0], before=sum(share * part.before for part, share in parts))


def cuts_by_round(world: World, records: Sequence[Record], rounds: int) -> list[Mapping[str, Any]]:
    """For every round from 1 on: each client's ``cut``, ``micro_batch`` (``None``: as configured) and whether it is
    ``there``, and the ``bytes`` that it fetched to move before it."""
    now: dict[str, dict[str, Any]] = {
        name: {"cut": cut, "micro_batch": None, "there": name not in world.absent} for name, cut in world.cuts.items()
    }
    found: list[Mapping[str, Any]] = []
    changes = [record for record in records if record["kind"] in ("move", "presence")]
    for number in range(1, rounds + 1):
        now = {name: {**own, "bytes": 0} for name, own in now.items()}
        for record in changes:
            if record["round"] != number:
                continue
            own = now[record["client"]]
            if record["kind"] == "move":
                own |= {"cut": tuple(record["cut"]), "micro_batch": record["micro_batch"], "bytes": record["bytes"]}
            else:
                own["there"] = record["there"]
        found.append(now)
    return found


@dataclass(frozen=True)
class Phase:
    """Rounds in which nothing changed.

    Attributes:
        only: nothing changed in the whole run.
        there: the clients that took part.
        micro_batches: of each client; ``None``: as configured.
        fetched: bytes that each client fetched before the phase to move its cut.
    """

    rounds: list[int]
    only: bool
    devices: Mapping[str, Profile]
    cuts: Mapping[str, tuple[int, int]]
    micro_batches: Mapping[str, int | None]
    there: list[str]
    fetched: Mapping[str, int]

    @property
    def key(self) -> Any:
        """Equal for phases in which steps cost the same."""
        return tuple(self.cuts.items()), tuple(self.micro_batches.items())


def phases(world: World, records: Sequence[Record], rounds: int) -> list[Phase]:
    """The phases of a run whose clients have devices, of which ``rounds`` are done."""
    names = [client.name for client in world.federation.clients]
    settings = []
    for number, clients in enumerate(cuts_by_round(world, records, rounds), start=1):
        settings.append((devices_at(world.config, names, number), clients))
    found: list[Phase] = []
    for number, (classes, clients) in enumerate(settings, start=1):
        same = number > 1 and classes == settings[number - 2][0] and not _changed(settings[number - 2][1], clients)
        if same:
            found[-1].rounds.append(number)
            continue
        found.append(
            Phase(
                [number],
                False,
                assign(world.config.devices, classes),
                {name: own["cut"] for name, own in clients.items()},
                {name: own["micro_batch"] for name, own in clients.items()},
                [name for name, own in clients.items() if own["there"]],
                {name: own["bytes"] for name, own in clients.items()},
            )
        )
    if len(found) == 1:
        return [Phase(**{**vars(found[0]), "only": True})]
    return found


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return any(
        before[name][key] != after[name][key] for name in after for key in ("cut", "micro_batch", "there")
    ) or any(own["bytes"] for own in after.values())


class VirtualTime:
    """The clock of one run. Where something changed all clients begin anew together: the last one's end is waited for,
    and so is what moving fetched."""

    def __init__(self, world: World, schedule: Schedule) -> None:
        self._world, self._schedule, self._config = world, schedule, world.config.devices
        self.rounds: list[float] = []
        self.clients: dict[str, ClientTime] = {}

    def go_on(self, phase: Phase, work: Mapping[str, ClientWork]) -> None:
        """Let the rounds of a phase pass."""
        config = self._config
        began = max([*self.rounds[-1:], *(time.finished for time in self.clients.values())], default=0.0)
        began += max((8 * size / phase.devices[name].downlink_bps for name, size in phase.fetched.items()), default=0.0)
        if not work:
            self.rounds += [began] * len(phase.rounds)
            return
        virtual = simulate(
            self._schedule,
            work,
            phase.devices,
            Profile.from_class(config.server, config.classes),
            slots=config.server_slots,
            seed=self._world.config.seed,
        )
        self.rounds += [began + end for end in virtual.rounds]
        for name, time in virtual.clients.items():
            own = self.clients.setdefault(name, ClientTime())
            for key in ("computing", "transmitting", "waiting", "offline"):
                setattr(own, key, getattr(own, key) + getattr(time, key))
            own.finished = began + time.finished

    def facts(self) -> dict[str, Any]:
        """As a summary has them."""
        return {"rounds": self.rounds, "clients": {name: asdict(time) for name, time in self.clients.items()}}
