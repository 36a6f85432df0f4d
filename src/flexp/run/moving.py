"""A client that watches its own device while it trains, and moves its cut when that changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flexp.client.model import SplitModel
from flexp.client.recut import Blocks, Parking, recut
from flexp.client.trainer import Trainer
from flexp.config import RunConfig
from flexp.cost.choice import Choice
from flexp.cost.device import free_bytes
from flexp.data.types import Federation
from flexp.errors import FlexpError, LinkLostError, StorageError
from flexp.planner.accuracy import prior
from flexp.planner.model import ModelCosts
from flexp.planner.options import Option, grid, options_of
from flexp.planner.policy import Decision, DevicePolicy, Situation
from flexp.report.metrics import Record
from flexp.run.planned import auto_fleet
from flexp.run.settle import model_folder

TOO_SHORT = 1e-4
"""Seconds; what takes less is not compared with its prediction."""
WARM_UP = 3
"""Steps before the first look: the first ones allocate and load."""


@dataclass(frozen=True)
class Spent:
    """Seconds so far: of the client's own computing, of the server's for it, and on the link (and in the queue)."""

    client: float
    server: float
    link: float


class Mover:
    """Looks at the device every few steps, and does what :class:`flexp.planner.policy.DevicePolicy` says.

    Args:
        resting: bytes that a client with a choice holds between two steps.
        blocks: gives pretrained blocks, tuned as this client's.
    """

    def __init__(
        self,
        trainer: Trainer,
        watch: DevicePolicy,
        resting: Callable[[Choice], int],
        blocks: Blocks,
        parking: Parking,
        total_steps: int,
    ) -> None:
        self.trainer, self.watch, self.blocks, self.parking = trainer, watch, blocks, parking
        self._resting, self._total = resting, total_steps
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
        due = steps - self._since >= self.watch.rules.every
        if not due and not self.watch.short(self._memory()):
            return None
        now = self._situation()
        decision = self.watch.look(now, steps, self._total - steps)
        self._restart()
        return None if decision is None else self._do(decision, now)

    def after_failure(self) -> Record | None:
        """A step ran out of memory: choose something smaller, to do it again; ``None``: there is nothing smaller.

        Raises:
            LinkLostError: see :meth:`after_step`.
        """
        self._notice()
        decision = self.watch.less()
        if decision is None:
            return None
        record = self._do(decision, Situation(self._memory()))
        if record["kind"] == "refused move":  # whatever the reason, the step must not wait for it to go away
            self.watch.refused(decision.choice)
        return record

    def _do(self, decision: Decision, now: Situation) -> Record:
        before, choice = self.watch.current, decision.choice
        began = time.perf_counter()
        record: Record = {
            "kind": "move", "client": self.trainer.name, "step": self.trainer.steps, "why": decision.why,
            "gain": decision.gain, "before": list(before.cut), "cut": list(choice.cut),
            "micro_batch_before": before.micro_batch, "micro_batch": choice.micro_batch, "restored": [],
            "memory_bytes": now.memory_bytes, "client_ratio": now.client, "server_ratio": now.server,
            "link_ratio": now.link, "fits": decision.fits,
        }  # fmt: skip
        if choice.cut != before.cut:
            try:
                record["restored"] = list(recut(self.trainer, choice.cut, self.blocks, self.parking).restored)
            except LinkLostError:
                raise
            except FlexpError as error:
                if not isinstance(error, StorageError):  # a full disk may have room again
                    self.watch.refused(choice)
                return {**record, "kind": "refused move", "why": str(error)}
        self.trainer.micro_batch = choice.micro_batch
        self.watch.moved(choice, self.trainer.steps)
        self._restart()
        return record | {"seconds": time.perf_counter() - began}

    def _notice(self) -> None:
        """A client that went back to a snapshot has what it had then."""
        model, size = self.trainer.model, self.trainer.micro_batch
        assert isinstance(model, SplitModel)
        for option in self.watch.options:
            if (option.choice.cut, option.choice.micro_batch) == (model.cut, size):
                self.watch.current = option.choice

    def _situation(self) -> Situation:
        """What was measured since the last look ÷ what was predicted, and the memory."""
        now, steps = self._spent(), self.trainer.steps - self._since
        found: Option = next(option for option in self.watch.options if option.choice == self.watch.current)
        predicted = found.prediction

        def ratio(measured: float, seconds: float) -> float:
            return max(measured, 0.0) / steps / seconds if seconds > TOO_SHORT else 1.0

        return Situation(
            self._memory(),
            ratio(now.client - self._before.client, predicted.client_seconds),
            ratio(now.server - self._before.server, predicted.server_seconds),
            ratio(now.link - self._before.link, predicted.link_seconds),
        )

    def _memory(self) -> int:
        """Bytes for training in all, as predictions count: what is free, and what the client holds."""
        return free_bytes() + self._resting(self.watch.current)

    def _restart(self) -> None:
        self._since, self._before = self.trainer.steps, self._spent()

    def _spent(self) -> Spent:
        model = self.trainer.model
        assert isinstance(model, SplitModel)
        meter = model.link.meter.training
        return Spent(
            self.trainer.seconds - meter.waited_seconds,
            meter.server_seconds,
            meter.waited_seconds - meter.server_seconds,
        )


def make_mover(config: RunConfig, federation: Federation, trainer: Trainer, blocks: Blocks, parking: Parking) -> Mover:
    """Watch this machine for a client of a run, whose ``config`` is its own.

    Its speed is what its profile says (``data.clients.profiles``), else a laptop's; what is measured corrects that.

    Raises:
        ModelError: the model's costs cannot be counted.
    """
    model = trainer.model
    assert isinstance(model, SplitModel)
    fleet = auto_fleet(config.model_copy(update={"devices": None}), federation)
    total, (start, stop), size = model.stage.anatomy.blocks, model.cut, trainer.micro_batch
    checkpointing, batch = config.model.gradient_checkpointing, config.train.batch_size
    choices = fleet.choices.model_copy(update={
        "starts": list(range(max(1, model.base_depth), total)),
        "tails": [0, 1] if stop == total else [total - stop],  # of what is behind e the server may have nothing
        "checkpointing": [checkpointing],
    })  # fmt: skip
    rank = config.model.lora.rank if config.model.tuning == "lora" else None
    current = Choice((start, stop), size, -(-batch // size), checkpointing, rank, choices.codecs[0])
    costs = ModelCosts(model_folder(config), fleet.task, choices, fleet.server)
    known = list(dict.fromkeys([current, *grid(choices, total, batch, rank)]))
    curve = prior()
    device = next((device for device in fleet.devices if device.name == trainer.name), fleet.devices[0])
    options = options_of(device, known, costs.predict, lambda choice: curve.loss(choice, total))
    steps = config.train.total_steps
    return Mover(trainer, DevicePolicy(options, current, config.recut), costs.resting, blocks, parking, steps)


def in_words(record: Record) -> str:
    """What :meth:`Mover.after_step` gave, for a person."""
    name, cut = record["client"], tuple(record["cut"])
    if record["kind"] == "refused move":
        return f"{name}: cut {cut} would be better, but: {record['why']}"
    shown = f"{record['memory_bytes'] / 2**20:.0f} MiB for training"
    why = f"{shown} are left" if record["why"] == "memory" else f"{100 * record['gain']:.0f} % better"
    if not record["fits"]:
        why += ", which is too little for any choice"
    what = f"cut {tuple(record['before'])} becomes {cut}"
    if record["cut"] == record["before"]:
        what = f"{record['micro_batch']} examples at a time instead of {record['micro_batch_before']}"
    back = f", block {', '.join(map(str, record['restored']))} as before" if record["restored"] else ""
    return f"{name}, step {record['step']}: {what}{back} ({why}; {record['seconds']:.2f} s)"
