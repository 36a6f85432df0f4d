"""What answering several clients together gives (``server.joined``): requests a second, joined ÷ one by one.

The server alone is timed: as many clients as are asked for each have a forward in line, then a backward, and every
backward is an update. Two servers take turns, one of which joins what waits. No client computes and nothing crosses, so
this is the most that joining can give; each shape's first rounds, in which the server measures what pays, do not count.
Predicted: 3 times at 1 × 16 tokens from 8 clients on, 1.3 at 8 × 16, and 1.0 at 8 × 128, where a client alone fills the
processor's caches as well; 1.0 with one client, whom nobody waits with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated, Any

import torch
import typer

from benchmarks.tools.command import Kind, Model, Pairs, Result, Threads, fetched, say
from benchmarks.tools.one_client import without_dropout
from benchmarks.tools.paired import paired
from benchmarks.tools.parties import Parties, parties
from flexp.config import AlignConfig, ServerConfig
from flexp.links.base import never_wait
from flexp.links.messages import BackwardRequest, ForwardRequest, Join
from flexp.models.fingerprint import fingerprint


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    counts: Annotated[str, typer.Option(help="How many clients, with commas.")] = "1,8,32",
    shapes: Annotated[str, typer.Option(help="Texts x tokens of a request, with commas.")] = "1x16,8x16",
    own: Annotated[bool, typer.Option(help='With server.adapters = "own".')] = False,
    processor: Annotated[bool, typer.Option(help="Seconds of the processor, which other work hardly changes.")] = False,
    pairs: Pairs = 6,
    threads: Threads = 1,
) -> Result:
    """Requests a second that a server with LoRA answers together, against one by one, in turn."""
    never_wait()
    found, rows = [], []
    with without_dropout(fetched(model, threads)) as (folder, _):
        for shape in shapes.split(","):
            examples, length = map(int, shape.split("x"))
            here = parties(folder, kind, examples=examples, length=length, tuning="lora")
            for count in map(int, counts.split(",")):
                alone, joined = (a_round(here, count, (examples, length), own, how) for how in (False, True))
                timed = paired(alone, joined, pairs, time.process_time if processor else time.perf_counter)
                ratio, low, high = 1 / timed.ratio, *(1 / value for value in timed.quartiles[::-1])
                say(f"{count} clients, {shape}: {ratio:.2f}")
                found.append({
                    "shape": [examples, length], "clients": count, "ratio": ratio, "ratio_quartiles": [low, high],
                    "alone_seconds": timed.first / count, "joined_seconds": timed.second / count,
                })  # fmt: skip
                rows.append((
                    shape, str(count), f"{ratio:.2f} ({low:.2f}–{high:.2f})",
                    *(f"{1e3 * seconds / count:.1f}" for seconds in (timed.first, timed.second)),
                ))  # fmt: skip
    columns = ("texts x tokens", "clients", "joined ÷ one by one", "ms a request, one by one", "ms, joined")
    return Result({"model": model, "own": own, "processor": processor, "rows": found}, rows, columns)


def a_round(here: Parties, count: int, shape: tuple[int, int], own: bool, joined: bool) -> Callable[[], None]:
    """A forward and a backward of every client of a server of its own."""
    adapters: Any = "own" if own else "shared"
    server = here.server(ServerConfig(adapters=adapters, joined=joined, max_in_flight_total=count))
    stage = server.shared.stage
    clients = [f"client-{number}" for number in range(count)]
    for client in clients:
        server.answer(client, Join(
            client=client, fingerprint=fingerprint(stage.model.config), cut=here.cut, dtype=str(stage.model.dtype),
            tuning="frozen", weights=stage.weights, align=AlignConfig(kind="off"),
        ))  # fmt: skip
    z_BTH = torch.randn(count, *shape, stage.anatomy.hidden, generator=torch.Generator().manual_seed(0))
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        for grad in (False, True):
            answers = []
            for client, own_BTH in zip(clients, z_BTH, strict=True):
                request: Any = ForwardRequest(step, own_BTH, None, train=True, step=step)
                if grad:
                    request = BackwardRequest(step, 1e-4 * own_BTH, step=step, exchanges=1)
                answers.append(server.answer(client, request))
            while server.work() == 0.0:
                pass
            for answer in answers:
                if isinstance(answer, Future):
                    answer.result(0)

    return run
