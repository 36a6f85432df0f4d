"""Cuts that follow devices while a run trains: what :mod:`flexp.planner.policy` decides is done, recorded and told.

A client of a deployment watches its own device (:class:`Mover`). A simulation knows all devices, and looks at them
before every round (:class:`Recutting`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

from flexp.client.model import SplitModel
from flexp.client.recut import Parking, recut
from flexp.client.trainer import Trainer
from flexp.config import RunConfig
from flexp.cost.choice import Choice
from flexp.cost.device import free_bytes
from flexp.errors import FlexpError, LinkLostError, StorageError
from flexp.methods.base import Method, World
from flexp.methods.parties import own_config
from flexp.methods.split import Split
from flexp.planner.accuracy import prior
from flexp.planner.fleet import Choices, Fleet
from flexp.planner.model import ModelCosts
from flexp.planner.options import Option, grid, options_of
from flexp.planner.policy import Decision, DevicePolicy, Situation, Stop, decide_for_all
from flexp.report.formats import cut as shown
from flexp.report.metrics import Record
from flexp.run.participants import devices_at
from flexp.run.planned import auto_fleet
from flexp.run.settle import ClientSetup, model_folder

TOO_SHORT = 1e-4
"""Seconds; what takes less is not compared with its prediction."""
WARM_UP = 3
"""Steps before the first look: the first ones allocate and load."""


class Mover:
    """Looks at a client's own device every few steps, and does what :class:`flexp.planner.policy.DevicePolicy` says.

    Its speed is what its profile says (``data.clients.profile``), else a laptop's; what is measured corrects that.

    Raises:
        ModelError: the model's costs cannot be counted.
    """

    def __init__(self, setup: ClientSetup, trainer: Trainer, parking: Parking) -> None:
        assert isinstance(trainer.model, SplitModel)
        self.trainer, self.model, self.parking, self.blocks = trainer, trainer.model, parking, setup.load
        config, total, (start, stop) = setup.config, setup.run.blocks, self.model.cut
        fleet = auto_fleet(config, setup.run.federation, classes={})
        choices = fleet.choices.model_copy(update={
            "starts": list(range(max(1, self.model.base_depth), total)),
            "tails": [0, 1] if stop == total else [total - stop],  # of what is behind e the server may have nothing
            "checkpointing": [config.model.gradient_checkpointing],
        })  # fmt: skip
        current = _choice(config, (start, stop), trainer.micro_batch)
        costs, curve = ModelCosts(model_folder(config), fleet.task, choices, fleet.server), prior()
        known = list(dict.fromkeys([current, *grid(choices, total, config.train.batch_size, current.rank)]))
        device = next((device for device in fleet.devices if device.name == trainer.name), fleet.devices[0])
        options = options_of(device, known, costs.predict, lambda choice: curve.loss(choice, total))
        self.policy = DevicePolicy(options, current, config.recut)
        self._resting, self._total = costs.resting, config.train.total_steps
        self.begin()

    def begin(self) -> None:
        """Measure anew, after a warm-up: the client has come, or gone back to a snapshot."""
        self._notice()
        self._first = self.trainer.steps + WARM_UP
        self._restart()

    def after_step(self) -> Record | None:
        """Between two steps: look, if it is time to or memory is short, and move; gives what was done, for the diary.

        Raises:
            LinkLostError: the link was lost while it moved; the client has its old cut.
        """
        steps = self.trainer.steps
        if steps == self._first - WARM_UP + 1:  # the first step allocates
            self._restart()
        if steps < self._first:
            return None
        self._notice()
        due = steps - self._since >= self.policy.rules.every
        if not due and not self.policy.short(self._memory()):
            return None
        now = self._situation()
        decision = self.policy.look(now, steps, self._total - steps)
        self._restart()
        return None if decision is None else self._do(decision, now)

    def after_failure(self, *, there: bool = False) -> Record | None:
        """A step ran out of memory, here or on the server (``there``): choose something smaller, to do it again;
        ``None``: there is nothing smaller.

        Raises:
            LinkLostError: see :meth:`after_step`.
        """
        self._notice()
        decision = self.policy.less(self._memory() if there else None)
        if decision is None:
            return None
        record = self._do(decision, Situation(self._memory()))
        if record["kind"] == "refused move":  # whatever the reason, the step must not wait for it to go away
            self.policy.refused(decision.choice)
        return record

    def _do(self, decision: Decision, now: Situation) -> Record:
        before, choice, steps = self.policy.current, decision.choice, self.trainer.steps
        began = time.perf_counter()
        ratios = {"client_ratio": now.client, "server_ratio": now.server, "link_ratio": now.link}
        record = _record(self.trainer.name, before, decision, step=steps, memory_bytes=now.memory_bytes, **ratios)
        if choice.cut != before.cut:
            try:
                record["restored"] = list(recut(self.trainer, choice.cut, self.blocks, self.parking).restored)
            except LinkLostError:
                raise
            except FlexpError as error:
                if not isinstance(error, StorageError):  # a full disk may have room again
                    self.policy.refused(choice)
                return {**record, "kind": "refused move", "why": str(error)}
        self.trainer.micro_batch = choice.micro_batch
        self.policy.moved(choice, steps)
        self._restart()
        return record | {"seconds": time.perf_counter() - began}

    def _notice(self) -> None:
        """A client that went back to a snapshot has what it had then."""
        for option in self.policy.options:
            if (option.choice.cut, option.choice.micro_batch) == (self.model.cut, self.trainer.micro_batch):
                self.policy.current = option.choice

    def _situation(self) -> Situation:
        """What was measured since the last look ÷ what was predicted, and the memory."""
        steps = self.trainer.steps - self._since
        found: Option = next(option for option in self.policy.options if option.choice == self.policy.current)
        predicted = (found.prediction.client_seconds, found.prediction.server_seconds, found.prediction.link_seconds)
        ratios = [
            max(now - before, 0.0) / steps / seconds if seconds > TOO_SHORT else 1.0
            for now, before, seconds in zip(self._spent(), self._before, predicted, strict=True)
        ]
        return Situation(self._memory(), *ratios)

    def _memory(self) -> int:
        """Bytes for training in all, as predictions count: what is free, and what the client holds."""
        return free_bytes(str(self.model.model.device)) + self._resting(self.policy.current)

    def _restart(self) -> None:
        self._since, self._before = self.trainer.steps, self._spent()

    def _spent(self) -> tuple[float, float, float]:
        """Seconds so far: of own computing, of the server's for this client, and on the link (and in the queue)."""
        meter = self.model.link.meter.training
        waited, server = meter.waited_seconds, meter.server_seconds
        return self.trainer.seconds - waited, server, waited - server


class Recutting:
    """Looks at the devices before every round; does nothing without ``devices.changes`` and ``recut.on``."""

    def __init__(self, world: World, method: Method) -> None:
        config = world.config
        self.world, self.method = world, method
        self.names = [client.name for client in world.federation.clients]
        # without any there is nothing to follow: all clients share this machine
        self.active = config.on_devices and (config.recut.on or bool(config.devices.changes))

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
        current = {device.name: self._current(method, device.name) for device in fleet.devices}
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
            before, choice = method.account(name).evaluation.bytes_down, decision.choice
            move = method.recut(name, choice.cut, choice.micro_batch)
            fetched = method.account(name).evaluation.bytes_down - before
            done = {"restored": list(move.restored), "bytes": fetched, "seconds": move.seconds}
            records.append(_record(name, current[name], decision, round=number, **done))
        return records

    def _fleet(self, number: int) -> Fleet:
        config = self.world.config
        classes = devices_at(config, self.names, number)
        return replace(auto_fleet(config, self.world.federation, classes), choices=self._choices)

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

    def _current(self, method: Split, name: str) -> Choice:
        own = own_config(self.world.config, self.world.config.data.clients.every(self.names)[name])
        return _choice(own, method.cut_of(name), method.clients[name].micro_batch)


def _choice(config: RunConfig, cut: tuple[int, int], micro_batch: int) -> Choice:
    """What a client with a configuration of its own has now."""
    model = config.model
    return Choice(
        cut=cut,
        micro_batch=micro_batch,
        accumulation=-(-config.train.batch_size // micro_batch),
        checkpointing=model.gradient_checkpointing,
        rank=model.lora.rank if model.tuning == "lora" else None,
        codec=config.link.codec.activation,
    )


def _record(client: str, before: Choice, decision: Decision, **more: Any) -> Record:
    """A move as the diary has it."""
    choice = decision.choice
    return {
        "kind": "move", "client": client, "why": decision.why, "gain": decision.gain, "fits": decision.fits,
        "before": list(before.cut), "cut": list(choice.cut), "micro_batch_before": before.micro_batch,
        "micro_batch": choice.micro_batch, "restored": [], **more,
    }  # fmt: skip


def in_words(record: Record) -> str:
    """A move, a refused one, or a client that left or came back, for a person."""
    name, step = record["client"], f", step {record['step']}" if "step" in record else ""
    if record["kind"] == "presence":
        return f"{name} {'is back' if record['there'] else 'cannot go on'}: {record['why']}"
    if record["kind"] == "refused move":
        return f"{name}: cut {shown(record['cut'])} would be better, but: {record['why']}"
    what = f"cut {shown(record['before'])} becomes {shown(record['cut'])}"
    if record["cut"] == record["before"]:
        what = f"{record['micro_batch']} examples at a time instead of {record['micro_batch_before']}"
    back = f", block {', '.join(map(str, record['restored']))} as before" if record["restored"] else ""
    why = f"{100 * record['gain']:.0f} % better"
    if record["why"] == "memory":
        left = record.get("memory_bytes")
        why = "memory is short" if left is None else f"{left / 2**20:.0f} MiB for training are left"
    if not record["fits"]:
        why += ", which is too little for any choice"
    return f"{name}{step}: {what}{back} ({why}; {record['seconds']:.2f} s)"
