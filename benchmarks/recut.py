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
from typing import Annotated, Any

import torch
import typer

from benchmarks.tools.command import Result
from flexp.cli.verify import parse_cut
from flexp.client.recut import Move, recut
from flexp.client.trainer import Trainer
from flexp.config import RunConfig
from flexp.config.loading import load
from flexp.links.grpc import connect, serve
from flexp.links.opening import connected
from flexp.models.anatomy import check_cut
from flexp.run.server import make_server
from flexp.run.settle import ClientSetup, settle_client
from flexp.run.store import ParkedOnDisk

WINDOW = 10
"""Steps before and after a move whose losses and seconds are compared."""

COLUMNS = ("move", "blocks", "s", "steps", "before", "after", "spread", "change", "twin", "jump")

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


def measure(
    config: Annotated[Path, typer.Argument(help="A run's configuration; real data make the losses mean something.")],
    client: Annotated[str | None, typer.Option(help="Which client of the data; of several it must be said.")] = None,
    cuts: Annotated[str, typer.Option(metavar="S:E,…", help="One after another.")] = "1:6,4:6,1:6,4:6",
    steps: Annotated[int, typer.Option(min=2 * WINDOW, help="With each cut.")] = 2 * WINDOW,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. threads=1.")
    ] = None,
) -> Result:
    """What moving a cut costs in the time of steps, and what it does to the loss, beside a twin that does not move."""
    return compare(load(config, settings or ()), [parse_cut(cut) for cut in cuts.split(",")], client, steps)


def compare(config: RunConfig, cuts: Sequence[Cut], client: str | None = None, steps: int = 2 * WINDOW) -> Result:
    """The same, of a configuration that is loaded; ``client`` = ``None``: the only one."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    train = config.train.model_copy(update={"rounds": 1, "steps_per_round": len(cuts) * steps})
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
    found = [_facts(at, done, moving, still) for at, done in moves]
    ends = [fmean(side.losses[-WINDOW:]) for side in (moving, still)]
    facts = {
        "model": config.model.id, "client": setup.data.name, "steps": steps, "window": WINDOW, "rows": found,
        "loss_end": ends[0], "twin_loss_end": ends[1],
    }  # fmt: skip
    rows = []
    for row in found:
        blocks = f"+{len(row['came'])}" if row["came"] else f"-{len(row['went'])}"
        rows.append([
            " > ".join(":".join(map(str, row[key])) for key in ("before", "after")),
            f"{blocks} ({len(row['restored'])} back)" if row["restored"] else blocks,
            *(f"{row[key]:.2f}" for key in ("seconds", "steps", "loss_before", "loss_after", "spread")),
            *(f"{row[key]:+.2f}" for key in ("loss_change", "twin_change", "jump")),
        ])  # fmt: skip
    note = (
        f"{setup.data.name}, {steps} steps with each cut. s, steps: a move's time. Losses before and after are means "
        f"of {WINDOW} steps, spread is theirs; jump is the change less the twin's. At the end {ends[0]:.3f}, the twin "
        f"that stayed at its first cut {ends[1]:.3f}"
    )
    return Result(facts, rows, COLUMNS, [note])


def _facts(at: int, done: Move, moving: _Side, still: _Side) -> dict[str, Any]:
    """Of one move, which happened after ``at`` steps."""
    before, after = slice(at - WINDOW, at), slice(at, at + WINDOW)
    one_step = median(moving.seconds[before])
    change = fmean(moving.losses[after]) - fmean(moving.losses[before])
    twins = fmean(still.losses[after]) - fmean(still.losses[before])
    return {
        "before": list(done.before), "after": list(done.after), "came": list(done.came),
        "restored": list(done.restored), "went": list(done.went), "seconds": done.seconds, "step_seconds": one_step,
        "steps": done.seconds / one_step, "loss_before": fmean(moving.losses[before]),
        "loss_after": fmean(moving.losses[after]), "loss_change": change, "twin_change": twins, "jump": change - twins,
        "spread": stdev(moving.losses[before]),
    }  # fmt: skip


def _side(config: RunConfig, setup: ClientSetup, stack: ExitStack) -> _Side:
    server = make_server(config, 1, None, setup.run.federation.task.model_kind, [setup.data.name])
    serving = stack.enter_context(serve(server))
    link = stack.enter_context(connected(connect(f"grpc://{serving.address}", setup.data.name, codec="off")))
    return _Side(setup.join(link)[0])
