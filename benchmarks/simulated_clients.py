"""What a client costs in a simulation of 1 to 100 of them.

Simulated LoRA clients share the frozen model, so each should cost its adapters, their optimiser state and some empty
modules. Predicted: memory grows by about 12 bytes per personal parameter (fp32 weight and two Adam moments) plus about
a megabyte of Python objects per client, whatever the size of the model.
"""

from __future__ import annotations

import gc
import time
from typing import Annotated

import psutil
import typer

from benchmarks.tools.command import Kind, Model, Result, Threads, fetched
from benchmarks.tools.parties import Step, parties
from flexp.client.model import SplitModel
from flexp.config import ServerConfig


def measure(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    most: Annotated[int, typer.Option(min=2, help="Clients at the end.")] = 100,
    own: Annotated[bool, typer.Option("--own", help="Each also has adapters of its own on the server.")] = False,
    threads: Threads = 2,
) -> Result:
    """Memory and time of 1 to 100 simulated LoRA clients that share one frozen model: each trains for one step."""
    here = parties(fetched(model, threads), kind, examples=4, length=32, tuning="lora")
    blocks = here.source.anatomy.blocks
    size = sum(value.numel() * value.element_size() for value in here.source.model.parameters())
    for value in here.source.model.parameters():  # mapped from the file: read once, so that it does not count for them
        value.detach().sum()
    server = here.server(ServerConfig(adapters="own" if own else "shared"))
    clients: list[tuple[SplitModel, Step]] = []

    def add() -> None:
        # Cuts alternate between s = 1, 2, 3 where the model is deep enough.
        cut = (1 + len(clients) % min(3, blocks - 1), blocks)
        client = here.client(server.connect(f"client-{len(clients)}"), cut)
        clients.append((client, here.step(client.stage, client)))

    add()
    clients[0][1]()  # what the first step allocates once is not a client's cost
    clients.clear()
    before, found = _resident(), []
    for count in (*(count for count in (1, 2, 5, 10, 20, 50) if count < most), most):
        began, new = time.perf_counter(), len(clients)
        while len(clients) < count:
            add()
        made, began = time.perf_counter() - began, time.perf_counter()
        for _, step in clients[new:]:
            step()
        stepped = (time.perf_counter() - began) / max(1, count - new)
        found.append({"clients": count, "bytes": _resident() - before, "making_seconds": made, "step_seconds": stepped})
    personal = [sum(value.numel() for value in client.personal_state().values()) for client, _ in clients]
    facts = {
        "model": model, "own": own, "model_bytes": size, "rank": here.model.lora.rank,
        "personal_parameters": sum(personal) / len(personal), "rows": found,
        "bytes_per_client": (found[-1]["bytes"] - found[0]["bytes"]) / (most - found[0]["clients"]),
    }  # fmt: skip
    rows = [
        (f"{row['clients']} clients", f"{row['bytes'] / 1e6:.1f} MB, {1e3 * row['step_seconds']:.0f} ms a step")
        for row in found
    ]
    rows.append(("each further client", f"{facts['bytes_per_client'] / 1e6:.2f} MB"))
    rows.append(("its personal parameters", f"{facts['personal_parameters']:.0f}"))
    rows.append(("the whole model", f"{size / 1e6:.0f} MB"))
    return Result(facts, rows)


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
