"""Devices that change in the middle of a simulated run, and cuts that follow them (``devices.changes``, ``recut``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from flexp.config import DevicesConfig
from flexp.cost.choice import CODECS, Choice
from flexp.cost.classes import profile
from flexp.errors import ConfigError
from flexp.methods.base import Method, World
from flexp.methods.parties import own_config
from flexp.methods.split import Split
from flexp.planner.fleet import Choices, Fleet
from flexp.planner.model import ModelCosts
from flexp.planner.policy import Decision, Stop, decide_for_all
from flexp.report.formats import cut as shown
from flexp.report.metrics import Record
from flexp.run.planned import auto_fleet
from flexp.run.settle import model_folder


class Recutting:
    """Looks at the devices before every round; does nothing in a run without ``devices.changes`` and ``recut.on``."""

    def __init__(self, world: World, method: Method) -> None:
        config = world.config
        self.world, self.method = world, method
        self.names = [client.name for client in world.federation.clients]
        devices = config.devices  # without any there is nothing to follow: all clients share this machine
        self.active = devices is not None and (config.recut.on or bool(devices.changes))

    def before_round(self, number: int) -> list[Record]:
        """Move cuts, let clients go that their device cannot hold, and take them in again; gives what was done.

        Raises:
            LinkError: the server refuses a cut.
        """
        if not self.active:
            return []
        method, rules = self.method, self.world.config.recut
        assert isinstance(method, Split)
        fleet = self._fleet(number)
        current = {device.name: self._choice(method, device.name) for device in fleet.devices}
        found: dict[str, Decision | Stop] = {}
        for kind in sorted(
            {(choice.checkpointing, choice.codec) for choice in current.values()}
        ):  # which no move changes
            alike = {name: choice for name, choice in current.items() if (choice.checkpointing, choice.codec) == kind}
            choices = fleet.choices.model_copy(update={"checkpointing": [kind[0]], "codecs": [kind[1]]})
            devices = tuple(device for device in fleet.devices if device.name in alike)
            own = replace(fleet, devices=devices, choices=choices)
            found |= decide_for_all(own, self._costs, alike, gain=rules.gain, move=rules.on)
        records: list[Record] = []
        lacking = {name: decision.lacks for name, decision in found.items() if isinstance(decision, Stop)}
        for name in self.names:
            if (name in lacking) != (name in method.gone):
                method.gone ^= {name}
                records.append({"kind": "presence", "round": number, "client": name, "there": name not in method.gone,
                                "why": lacking.get(name, "its device can hold it again")})  # fmt: skip
        for name, decision in found.items():
            if isinstance(decision, Stop):
                continue
            choice = decision.choice
            before, size = method.account(name).evaluation.bytes_down, current[name].micro_batch
            move = method.recut(name, choice.cut, choice.micro_batch)
            fetched = method.account(name).evaluation.bytes_down - before
            records.append({"kind": "move", "round": number, "client": name, "before": list(move.before),
                            "cut": list(move.after), "micro_batch": choice.micro_batch, "micro_batch_before": size,
                            "restored": list(move.restored), "bytes": fetched, "seconds": move.seconds,
                            "gain": decision.gain})  # fmt: skip
        return records

    def _fleet(self, number: int) -> Fleet:
        config = self.world.config
        if config.devices is not None:
            config = config.model_copy(update={"devices": devices_at(config.devices, self.names, number)})
        return replace(auto_fleet(config, self.world.federation), choices=self._choices)

    @cached_property
    def _choices(self) -> Choices:
        """What may be chosen while training: cuts that the server has blocks for, and exchanges."""
        assert isinstance(self.method, Split)
        start, stop = self.method.server.blocks
        blocks, config = self.world.source.anatomy.blocks, self.world.config
        known = auto_fleet(config, self.world.federation).choices
        return known.model_copy(update={
            "starts": [s for s in known.starts or range(1, blocks) if start <= s < stop],
            "tails": [tail for tail in known.tails if blocks - tail <= stop] or [blocks - stop],
        })  # fmt: skip

    @cached_property
    def _costs(self) -> ModelCosts:
        fleet = self._fleet(1)
        return ModelCosts(model_folder(self.world.config), fleet.task, fleet.choices, fleet.server)

    def _choice(self, method: Split, name: str) -> Choice:
        config, size = self.world.config, method.clients[name].micro_batch
        own = own_config(config, self.names.index(name))
        return Choice(
            cut=method.cut_of(name),
            micro_batch=size,
            accumulation=-(-config.train.batch_size // size),
            checkpointing=own.model.gradient_checkpointing,
            rank=config.model.lora.rank if config.model.tuning == "lora" else None,
            codec=own.link.codec.activation if own.link.codec.activation in CODECS else self._choices.codecs[0],
        )


def told(record: Record) -> str:
    """A record of :meth:`Recutting.before_round` in words."""
    name = record["client"]
    if record["kind"] == "presence":
        return f"{name} {'is back' if record['there'] else 'cannot go on'}: {record['why']}"
    if record["cut"] == record["before"]:
        return f"{name}: {record['micro_batch']} examples at a time instead of {record['micro_batch_before']}"
    back = f", of which {len(record['restored'])} as it left them" if record["restored"] else ""
    return f"{name}: cut {shown(record['before'])} becomes {shown(record['cut'])}{back}"


def devices_at(config: DevicesConfig, names: Sequence[str], number: int) -> DevicesConfig:
    """The devices as they are in a round: ``assign`` has the class of each client."""
    classes = {name: config.assign[index % len(config.assign)] for index, name in enumerate(names)}
    for change in sorted(config.changes, key=lambda change: change.before_round):
        if change.before_round <= number:
            classes |= dict.fromkeys(names if change.clients is None else change.clients, change.to)
    return config.model_copy(update={"assign": [classes[name] for name in names], "changes": []})


def check_changes(world: World) -> None:
    """See that ``devices.changes`` names clients and classes that there are.

    Raises:
        ConfigError: it does not.
    """
    config, names = world.config, [client.name for client in world.federation.clients]
    for change in config.devices.changes if config.devices is not None else []:
        assert config.devices is not None
        profile(change.to, config.devices.classes)
        odd = [name for name in change.clients or [] if name not in names]
        if odd:
            raise ConfigError(f"devices.changes: the run has no client {odd[0]!r}; expected some of {', '.join(names)}")


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
