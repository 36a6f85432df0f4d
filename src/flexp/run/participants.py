"""Who can take part in a run on devices: what a client needs, against what its device has; and devices that change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

from flexp.config import DevicesConfig, RunConfig
from flexp.cost.profile import Profile, assign
from flexp.errors import ConfigError
from flexp.methods.base import World
from flexp.report.formats import size as shown
from flexp.run.costs import MemoryProbes


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
    """Measure what clients need, and name those absent whose device has less; without devices nobody is.

    A client whose peak could not be measured takes part, and a note says so.

    Raises:
        NobodyFitsError: nobody would be left.
        ConfigError: a device class is not known, or ``devices.changes`` names a client that there is not.
    """
    config = world.config
    if not config.on_devices:
        return world, []
    names = [client.name for client in world.federation.clients]
    _check_changes(config.devices, names)
    devices = assign(config.devices, config.data.clients.devices(names))
    Profile.from_class(config.devices.server, config.devices.classes)
    rounds = config.train.rounds
    notes = [
        *world.federation.notes,
        *(
            f"devices.changes: there is no round {change.before_round} in a run of {rounds}, so that change never comes"
            for change in config.devices.changes
            if change.before_round > rounds
        ),
    ]
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


def devices_at(config: RunConfig, names: Sequence[str], number: int) -> dict[str, str]:
    """The device class of each client as it is in a round."""
    classes = config.data.clients.devices(names)
    for change in sorted(config.devices.changes, key=lambda change: change.before_round):
        if change.before_round <= number:
            classes |= dict.fromkeys(names if change.clients is None else change.clients, change.to)
    return classes


def _check_changes(config: DevicesConfig, names: Sequence[str]) -> None:
    for change in config.changes:
        Profile.from_class(change.to, config.classes)
        odd = [name for name in change.clients or [] if name not in names]
        if odd:
            raise ConfigError(f"devices.changes: the run has no client {odd[0]!r}; expected some of {', '.join(names)}")
