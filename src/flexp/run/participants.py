"""A run on devices: who can hold what the method trains, and what the whole run would have taken there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

from flexp.cost.classes import assign, profile
from flexp.cost.clock import ClientWork, Schedule
from flexp.cost.flops import ExchangeCost
from flexp.errors import ConfigError
from flexp.methods.base import Account, Method, World
from flexp.report.formats import size as shown
from flexp.report.metrics import Record
from flexp.run.costs import Costs
from flexp.run.phases import Phase, VirtualTime, phases
from flexp.run.probes import MemoryProbes


class Dropped(TypedDict):
    """A client that cannot take part, and the bytes that tell why."""

    name: str
    device: str
    needed_bytes: int
    available_bytes: int


class NobodyFitsError(ConfigError):
    """No client's device can hold what the method trains; ``dropped`` are all of them."""

    def __init__(self, dropped: list[Dropped], message: str) -> None:
        super().__init__(message)
        self.dropped = dropped


def place(world: World, probes: MemoryProbes) -> tuple[World, list[Dropped]]:
    """Measure what clients need, and name those absent whose device has less; without ``[devices]`` nobody is.

    A client whose peak could not be measured takes part, and a note says so.

    Raises:
        NobodyFitsError: nobody would be left.
        ConfigError: a device class is not known.
    """
    config = world.config
    if config.devices is None:
        return world, []
    devices = assign(config.devices, [client.name for client in world.federation.clients])
    profile(config.devices.server, config.devices.classes)
    notes = list(world.federation.notes)
    probes.measure(notes.append)
    dropped: list[Dropped] = []
    for name, device in devices.items():
        needed = probes.peak(name)
        if needed is not None and needed > device.memory_bytes:
            facts: Dropped = {
                "name": name,
                "device": device.name,
                "needed_bytes": needed,
                "available_bytes": device.memory_bytes,
            }
            dropped.append(facts)
            notes.append(f"{name} is left out of {config.method.name}: {_why(facts)}")
    if len(dropped) == len(devices):
        nearest = min(dropped, key=lambda facts: facts["needed_bytes"] - facts["available_bytes"])
        raise NobodyFitsError(
            dropped,
            f"no client can take part in {config.method.name}: at best, {nearest['name']} {_why(nearest)}; raise "
            "devices.classes.NAME.memory_bytes, cut shallower, use LoRA or smaller batches, or a method that splits",
        )
    absent = frozenset(facts["name"] for facts in dropped)
    return replace(world, absent=absent, federation=replace(world.federation, notes=notes)), dropped


def _why(facts: Dropped) -> str:
    has, needs = shown(facts["available_bytes"]), shown(facts["needed_bytes"])
    return f"needs {needs} to train, and its {facts['device']} has {has}"


def client_facts(
    world: World, method: Method, records: Sequence[Record]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """After training: each client's ``device``, ``client_flops`` and ``server_flops``; and the virtual clock's times.

    Args:
        records: the run's diary; every step in it is one gradient evaluation.

    Returns:
        Facts by client (none without ``[devices]``), and ``{"rounds": [seconds], "clients": {name: {account:
        seconds}}}``; ``None`` where no client computes.
    """
    config = world.config.devices
    if config is None:
        return {}, None
    devices = assign(config, [client.name for client in world.federation.clients])
    facts: dict[str, dict[str, Any]] = {
        name: {"device": device.name, "client_flops": 0.0, "server_flops": 0.0} for name, device in devices.items()
    }
    schedule = world.method.schedule(world.config)
    rounds = max((int(record["round"]) for record in records if record["kind"] == "round"), default=0)
    if schedule is None or not rounds:
        return facts, None
    taken = Counter((record["client"], int(record["round"])) for record in records if record["kind"] == "step")
    costs: dict[Any, Costs] = {}
    clock = VirtualTime(world, schedule)
    for phase in phases(world, records, rounds):
        now = _in_phase(world, phase)
        counted = costs.setdefault(phase.key, Costs(now))
        work = {}
        for name in phase.there:
            steps = [taken[name, number] for number in phase.rounds]
            # Metered bytes are of the whole run: where anything changed in it, the counted exchange's are taken.
            account = method.account(name) if phase.only else None
            cost = _cost(counted, method, name)
            work[name] = own = client_work(cost, account, steps, schedule)
            facts[name]["client_flops"] += cost.client_step * sum(steps) + own.final
            facts[name]["server_flops"] += cost.server_step * sum(steps)
        clock.go_on(phase, work)
    return facts, clock.facts()


def client_work(cost: ExchangeCost, account: Account | None, steps: list[int], schedule: Schedule) -> ClientWork:
    """A client's work for the clock: operations as counted, bytes as metered in the whole run.

    Metered bytes are spread evenly over rounds (weights) or exchanges (activations, in the proportions of the messages
    of the counted one). Where a method sends both, the weights are those that the client trains, down before and up
    after every ``schedule.average_every`` rounds. Without an ``account`` they are those of the counted exchange.
    """
    rounds, total = len(steps), sum(steps)
    pull_every, average_every = schedule.pull_every, schedule.average_every
    if account is None:
        per_step = total * cost.exchanges
        up, down = (
            float(per_step * (cost.forward_up + cost.backward_up)),
            float(per_step * (cost.forward_down + cost.backward_down)),
        )
        down += cost.pull_down * (total // pull_every) if pull_every else 0
    else:
        up, down = float(account.training.bytes_up), float(account.training.bytes_down)
    work = ClientWork(
        steps,
        before=cost.before,
        between=cost.between,
        after=cost.after,
        server_forward=cost.server_forward,
        server_backward=cost.server_backward,
        exchanges=cost.exchanges,
        combined=cost.combined,
    )
    if schedule.kind == "synchronous":
        extra = max(
            0, (total if account is None else account.gradient_evaluations) - total
        )  # the adaptation of a personal model, after the last round
        return replace(work, weights_up=up / rounds, weights_down=down / rounds, final=extra * cost.client_step)
    if schedule.kind == "alone" or not total:
        return work
    if schedule.kind == "split-sync":
        weights = float(cost.weights)
        work = replace(work, weights_up=weights, weights_down=weights, weights_every=average_every)
        up = max(0.0, up - weights * (rounds // average_every))
        down = max(0.0, down - weights * math.ceil(rounds / average_every))
    if pull_every and cost.pull_down:
        work = replace(work, pull_every=pull_every, pull_down=float(cost.pull_down))
        down = max(0.0, down - cost.pull_down * (total // pull_every))
    up_each, down_each = up / total / cost.exchanges, down / total / cost.exchanges
    up_known, down_known = cost.forward_up + cost.backward_up, cost.forward_down + cost.backward_down
    return replace(
        work,
        forward_up=up_each * cost.forward_up / up_known,
        backward_up=up_each * cost.backward_up / up_known,
        forward_down=down_each * cost.forward_down / down_known,
        backward_down=down_each * cost.backward_down / down_known,
    )


def _in_phase(world: World, phase: Phase) -> World:
    """The world with the cuts and exchanges of a phase."""
    if phase.only:
        return world
    sizes = list(phase.micro_batches.values())
    clients = world.config.data.clients
    if None not in sizes:
        clients = clients.model_copy(update={"micro_batches": sizes})
    config = world.config.model_copy(update={"data": world.config.data.model_copy(update={"clients": clients})})
    return replace(world, config=config, cuts=dict(phase.cuts))


def _cost(costs: Costs, method: Method, client: str) -> ExchangeCost:
    """Of a client's mean step: in each phase, a part of the model may be frozen."""
    parts = [(costs.of(client, only), share) for only, share in method.phases]
    return replace(parts[0][0], before=sum(share * part.before for part, share in parts))
