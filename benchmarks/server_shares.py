"""What a server's time for one exchange is made of: the plan, forward, gradient, norms, optimiser, and what is left.

The server alone is timed, with one client: a forward, then a backward, which is an update. No client computes and
nothing crosses. Seconds are the processor's with one thread, so other work hardly changes them; what is left are checks
of what came, accounts, and what is remembered for retries. Predicted for 8 × 128 tokens: over nine tenths are forward
and gradient; for 1 × 16 under full tuning the optimiser is the most, as it reads every shared number three times
whatever the batch (it was a fifth: docs/benchmarks.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.joined import a_round
from benchmarks.tools.command import Kind, Model, Result, Threads, fetched, say
from benchmarks.tools.one_client import without_dropout
from benchmarks.tools.parties import parties
from flexp.models.stage import Stage
from flexp.optim import Updater
from flexp.server import session

SPANS: dict[str, tuple[Any, str]] = {
    "plan": (Stage, "plan_without_inputs"),
    "forward": (Stage, "run"),
    "gradient": (torch.autograd, "grad"),
    "norms": (session, "norms"),
    "optimiser": (Updater, "step"),
}
"""What is timed: functions that a server calls, none inside another."""


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    shapes: Annotated[str, typer.Option(help="Texts x tokens of a request, with commas.")] = "1x16,8x16,8x128",
    tuning: Annotated[Literal["full", "lora"], typer.Option(help="Of the shared blocks.")] = "full",
    exchanges: Annotated[int, typer.Option(min=1, help="Of each shape; three more come first.")] = 20,
    threads: Threads = 1,
) -> Result:
    """Shares of a server's time for an exchange, by the size of the request."""
    found, rows = [], []
    with without_dropout(fetched(model, threads)) as (folder, _):
        for shape in shapes.split(","):
            examples, length = map(int, shape.split("x"))
            here = parties(folder, kind, examples=examples, length=length, tuning=tuning)
            exchange = a_round(here, 1, (examples, length), False, False)
            for _ in range(3):
                exchange()
            with _timed() as spent:
                began = time.process_time()
                for _ in range(exchanges):
                    exchange()
                total = time.process_time() - began
            shares = {name: seconds / total for name, seconds in spent.items()}
            shares["rest"] = 1 - sum(shares.values())
            say(f"{shape}: {1e3 * total / exchanges:.1f} ms")
            found.append({"shape": [examples, length], "seconds": total / exchanges, "shares": shares})
            rows.append((
                shape, f"{1e3 * total / exchanges:.1f}", *(f"{100 * share:.0f}" for share in shares.values()),
            ))  # fmt: skip
    columns = ("texts x tokens", "ms", *(f"{name} %" for name in (*SPANS, "rest")))
    return Result({"model": model, "tuning": tuning, "rows": found}, rows, columns)


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds in each of :data:`SPANS` inside the ``with`` block."""
    spent, originals = dict.fromkeys(SPANS, 0.0), {name: getattr(*where) for name, where in SPANS.items()}

    def watched(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return originals[name](*args, **kwargs)
            finally:
                spent[name] += time.process_time() - began

        return call

    try:
        for name, where in SPANS.items():
            setattr(*where, watched(name))
        yield spent
    finally:
        for name, where in SPANS.items():
            setattr(*where, originals[name])
