"""A simulated run in phases, between which devices or cuts changed, and the virtual clock over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexp.cost.classes import DeviceProfile, assign, profile
from flexp.cost.clock import ClientTime, ClientWork, Schedule, simulate
from flexp.methods.base import World
from flexp.report.metrics import Record
from flexp.run.recutting import cuts_by_round, devices_at


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
    devices: Mapping[str, DeviceProfile]
    cuts: Mapping[str, tuple[int, int]]
    micro_batches: Mapping[str, int | None]
    there: list[str]
    fetched: Mapping[str, int]

    @property
    def key(self) -> Any:
        """Equal for phases in which steps cost the same."""
        return tuple(self.cuts.items()), tuple(self.micro_batches.items())


def phases(world: World, records: Sequence[Record], rounds: int) -> list[Phase]:
    """The phases of a run with ``[devices]``, of which ``rounds`` are done."""
    config = world.config.devices
    assert config is not None
    names = [client.name for client in world.federation.clients]
    settings = []
    for number, clients in enumerate(cuts_by_round(world, records, rounds), start=1):
        settings.append((tuple(devices_at(config, names, number).assign), clients))
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
                assign(config.model_copy(update={"assign": list(classes)}), names),
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
        config = world.config.devices
        assert config is not None
        self._world, self._schedule, self._config = world, schedule, config
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
            profile(config.server, config.classes),
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
