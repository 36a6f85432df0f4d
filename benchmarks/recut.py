"""What moving a cut costs in the time of steps, and what it does to the loss: beside a twin that does not move.

Both clients have the same data, batches and seeds, and a server each, over gRPC on this machine; blocks that come are
read from the checkpoint, as on a device. They take turns, so that a busy machine slows both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flexp.client.recut import recut
from flexp.client.trainer import Trainer
from flexp.config import RunConfig
from flexp.links.grpc import connect, serve
from flexp.links.opening import connected
from flexp.machine import machine
from flexp.models.parts import check_cut
from flexp.run.parked import ParkedOnDisk
from flexp.run.server import make_server
from flexp.run.settle import ClientSetup, settle_client

WINDOW = 10
"""Steps before and after a move whose losses and seconds are compared."""

Cut = tuple[int, int | None]


@dataclass
class _Side:
    trainer: Trainer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        done = self.trainer.step()
        self.losses.append(done.loss)
        self.seconds.append(done.seconds)


def bench(config: RunConfig, cuts: Sequence[Cut], *, client: str | None = None, steps: int = 20) -> dict[str, Any]:
    """Train ``steps`` steps with each of ``cuts`` in turn.

    Args:
        client: of the data; ``None``: the only one.

    Raises:
        ConfigError: a cut does not fit the model.
        FlexpError: what is wrong with model, data or configuration.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    steps = max(steps, 2 * WINDOW)
    total = len(cuts) * steps
    train = config.train.model_copy(update={"rounds": 1, "steps_per_round": total})
    config = config.model_copy(update={"train": train})
    setup = settle_client(config, client, cuts[0])
    wanted = [check_cut(cut, setup.run.blocks, where="--cuts") for cut in cuts]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        moving, still = (_side(config, setup, stack) for _ in range(2))
        moves = []
        for number, cut in enumerate(wanted):
            if number:
                done = recut(moving.trainer, cut, setup.load, ParkedOnDisk(folder, 1))
                moves.append((len(moving.losses), done))
            for _ in range(steps):
                moving.step()
                still.step()
    rows = []
    for at, done in moves:
        before, after = slice(at - WINDOW, at), slice(at, at + WINDOW)
        one_step = median(moving.seconds[before])
        change = fmean(moving.losses[after]) - fmean(moving.losses[before])
        twins = fmean(still.losses[after]) - fmean(still.losses[before])
        rows.append({
            "before": list(done.before), "after": list(done.after), "came": list(done.came),
            "restored": list(done.restored), "went": list(done.went), "seconds": done.seconds,
            "step_seconds": one_step, "steps": done.seconds / one_step,
            "loss_before": fmean(moving.losses[before]), "loss_after": fmean(moving.losses[after]),
            "loss_change": change, "twin_change": twins, "jump": change - twins,
            "spread": stdev(moving.losses[before]),
        })  # fmt: skip
    return {
        "bench": "recut", "model": config.model.id, "client": setup.data.name, "steps": steps, "window": WINDOW,
        "rows": rows,
        "loss_end": fmean(moving.losses[-WINDOW:]), "twin_loss_end": fmean(still.losses[-WINDOW:]),
        "machine": machine(),
    }  # fmt: skip


def _side(config: RunConfig, setup: ClientSetup, stack: ExitStack) -> _Side:
    server = make_server(config, 1, None, setup.run.federation.task.model_kind, [setup.data.name])
    serving = stack.enter_context(serve(server))
    link = stack.enter_context(connected(connect(f"grpc://{serving.address}", setup.data.name, codec="off")))
    return _Side(setup.join(link)[0])
