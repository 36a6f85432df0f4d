"""How many clients a server carries: a model of queues, and as much of it as this machine can try.

A client computes, sends z up, waits for h, computes, sends its gradient up, waits for the answer, and begins again. A
server works on one request after the other. Everything else follows: steps a second, what is in flight, versions of the
weights that are held, servers that are needed. Without ``--predict`` the same fleet is tried: clients that only wait
and send, in threads, over gRPC on the loopback, each prediction beside what was measured. What the model is calibrated
with, an exchange alone, is measured either way.
"""

from __future__ import annotations

import heapq
import math
import random
import threading
import time
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.tools.command import Examples, Length, Model, Result, fetched, say
from benchmarks.tools.parties import Parties, at_once, parties
from flexp.config import ServerConfig
from flexp.links.base import ask
from flexp.links.grpc import connect, serve
from flexp.links.messages import BackwardRequest, ForwardRequest

BUSY = 0.7
"""Of a server's time at most, unless it has one client, in a fleet that is predicted: beyond it queues grow quickly."""
COLUMNS = ("clients", "steps/s", "predicted", "p50 ms", "predicted", "p99 ms", "predicted", "versions", "predicted")
KNOWN = {  # seconds of the device, bit/s, seconds one way, share awake
    "phones": (1.0, 10e6, 0.05, 0.02),
    "hospitals": (0.2, 1e9, 0.005, 1.0),
    "service": (0.02, 10e9, 0.0005, 1.0),
}
FLEETS = (
    "fleet",
    "clients",
    "awake",
    "steps/s",
    "Mbit/s in",
    "servers",
    "busy",
    "in flight",
    "MB held",
    "versions",
    "$/h",
)


@dataclass(frozen=True)
class Fleet:
    """Clients that are alike, and what a server does for them.

    Attributes:
        own: seconds that a device computes in a step, on average (exponential).
        message: bytes of each of a step's four messages.
        bandwidth: bit/s of a client, each way.
        forward, backward: seconds of a server for each.
    """

    own: float
    forward: float
    backward: float
    message: int = 0
    bandwidth: float = math.inf
    latency: float = 0.0

    @property
    def cycle(self) -> float:
        """Seconds of a step without queues."""
        return self.own + 4 * (self.latency + 8 * self.message / self.bandwidth) + self.forward + self.backward


@dataclass
class Seen:
    """What one server and its clients did: ``waits`` are the seconds of the steps, without what the device computes."""

    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    busy: float = 0.0
    in_flight: list[int] = field(default_factory=list)
    versions: int = 0
    parts: tuple[float, float] = (0.0, 0.0)  # the middle seconds of a forward and of a backward, where it was tried

    @property
    def rate(self) -> float:
        return len(self.waits) / self.seconds


def simulate(fleet: Fleet, clients: int, steps: int = 20_000, seed: int = 0) -> Seen:
    """One server and so many awake clients, for about so many steps after a tenth more of settling down."""
    draw, one_way = random.Random(seed), fleet.latency + 8 * fleet.message / fleet.bandwidth
    events: list[tuple[float, int, int, str]] = []
    queue: deque[tuple[int, str]] = deque()
    began, held, started = [0.0] * clients, dict[int, int](), 0.0
    seen, version, versions, number, idle, rest = Seen(), 0, Counter[int](), 0, True, steps // 10

    def later(seconds: float, client: int, what: str) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (now + seconds, number, client, what))

    now = 0.0
    for client in range(clients):
        later(draw.random() * fleet.cycle, client, "begin")
    while len(seen.waits) < steps:
        now, _, client, what = heapq.heappop(events)
        if what == "begin":
            began[client] = now
            later(one_way, client, "forward")
        elif what == "tail":
            later(one_way, client, "backward")
        elif what in ("forward", "backward"):
            queue.append((client, what))
        else:  # the server is through with a request
            idle = True
            if what == "forward done":
                held[client] = version
                versions[version] += 1
                spent = draw.expovariate(2 / fleet.own) if fleet.own else 0.0
                began[client] += spent
                later(one_way + spent, client, "tail")
            else:
                old = held.pop(client)
                versions[old] -= 1
                if not versions[old]:
                    del versions[old]
                version += 1
                if rest:
                    rest -= 1
                    started = now
                else:
                    seen.waits.append(now + one_way - began[client])
                    seen.in_flight.append(len(held) + 1)
                    # The weights as they are now, and every older version that a forward holds.
                    seen.versions = max(seen.versions, len(versions.keys() | {version}))
                    seen.busy += fleet.forward + fleet.backward
                later(one_way + (draw.expovariate(2 / fleet.own) if fleet.own else 0.0), client, "begin")
        if idle and queue:
            client, what = queue.popleft()
            idle = False
            later(fleet.forward if what == "forward" else fleet.backward, client, f"{what} done")
    seen.seconds = now - started
    seen.busy /= seen.seconds
    return seen


def measure(
    model: Model = "asset:minilm-l6",
    counts: Annotated[str, typer.Option(help="How many clients, with commas.")] = "1,4,16,64,128",
    own: Annotated[float, typer.Option(min=0.0, help="Seconds that a client waits in a step, on average.")] = 0.4,
    seconds: Annotated[float, typer.Option(min=0.5, help="For each.")] = 10.0,
    examples: Examples = 1,
    length: Length = 16,
    predict: Annotated[bool, typer.Option("--predict", help="Predict fleets of 100 to a million instead.")] = False,
    price: Annotated[float, typer.Option(min=0.0, help="With --predict: of a server, $ an hour.")] = 0.1,
    service: Annotated[
        float | None, typer.Option(min=0.0, help="With --predict: seconds of a server for a step; default: measured.")
    ] = None,
) -> Result:
    """Steps a second, waiting and versions of a server with up to 128 clients, measured beside what the model says."""
    here = parties(fetched(model, 1), examples=examples, length=length, tuning="lora")
    if predict:
        parts = tried(here, 1, 0.0, seconds).parts if service is None else (0.4 * service, 0.6 * service)
        return _fleets(here, Fleet(own, *parts), price)
    alone = list[dict[str, float]]()
    found, rows = [], []
    for count in map(int, counts.split(",")):
        before = np.array(tried(here, 1, 0.0, seconds / 4).parts)  # anew each time: other processes come and go
        real = tried(here, count, own, seconds)
        fleet = Fleet(own, *(before + np.array(tried(here, 1, 0.0, seconds / 4).parts)) / 2)
        model_says = simulate(fleet, count, 4_000)
        pairs = [(real.rate, model_says.rate, 1.0), *(
            (float(np.percentile(real.waits, share)), float(np.percentile(model_says.waits, share)), 1e3)
            for share in (50, 99)
        )]  # fmt: skip
        say(f"{count} clients: {real.rate:.1f} steps a second, {model_says.rate:.1f} predicted")
        shown = [f"{scale * value:.3g}" for *values, scale in pairs for value in values]
        rows.append([str(count), *shown, str(real.versions), str(model_says.versions)])
        found.append({"clients": count, "measured": pairs_of(real), "predicted": pairs_of(model_says)})
        alone.append(alone_facts(fleet))
    facts = {"model": model, "batch": [examples, length], "own": own, "seconds": seconds, "rows": found}
    return Result(facts | {"alone": alone}, rows, COLUMNS, [alone_line(fleet)])


def alone_facts(fleet: Fleet) -> dict[str, float]:
    """What an exchange takes without queues, for JSON."""
    return {"forward_seconds": fleet.forward, "backward_seconds": fleet.backward}


def alone_line(fleet: Fleet) -> str:
    """The same in a line."""
    return f"one exchange alone: forward {1e3 * fleet.forward:.2f} ms, backward {1e3 * fleet.backward:.2f} ms"


def pairs_of(seen: Seen) -> dict[str, float]:
    """For JSON."""
    middle, last = np.percentile(seen.waits, [50, 99])
    return {"steps": seen.rate, "p50": float(middle), "p99": float(last), "versions": seen.versions}


def tried(here: Parties, count: int, own: float, seconds: float) -> Seen:
    """A real server with clients that wait, as long as devices would compute, and send."""
    most = max(64, 2 * count)
    server = here.server(ServerConfig(max_in_flight_total=most))
    waits: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    mask = here.batch["attention_mask"]
    hidden = torch.randn(*mask.shape, here.source.anatomy.hidden)

    def work(number: int, ready: threading.Barrier, stop: threading.Event) -> None:
        link, draw, exchange = links[number], random.Random(number), 0
        ready.wait()
        while not stop.is_set():
            time.sleep(draw.expovariate(2 / own) if own else 0.0)
            exchange += 1
            began = time.perf_counter()
            ask(link, ForwardRequest(exchange, hidden, mask, train=True))
            middle = time.perf_counter()
            time.sleep(draw.expovariate(2 / own) if own else 0.0)
            again = time.perf_counter()
            ask(link, BackwardRequest(exchange, hidden))
            waits[number].append((middle - began, time.perf_counter() - again))

    with ExitStack() as stack:
        serving = stack.enter_context(serve(server))
        links = [connect(f"grpc://{serving.address}", f"client-{number}") for number in range(count)]
        for link in links:
            stack.callback(link.close)
            here.client(link)  # joins
        passed = at_once(work, count, seconds)
    every = [pair for client in waits for pair in client]
    parts = np.median(np.array(every), axis=0)
    return Seen(passed, [sum(pair) for pair in every], versions=server.shared.peak_versions, parts=(parts[0], parts[1]))


def held_bytes(here: Parties) -> int:
    """That a forward of the server keeps for its backward, besides weights."""
    stage, found = here.whole(), dict[int, int]()
    z_BTH, plan = stage.plan(here.batch)
    weights = {value.untyped_storage().data_ptr() for value in stage.model.state_dict().values()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        alive = stage.run(z_BTH, plan, *here.cut)  # or storages would be used twice
    assert alive.requires_grad
    return sum(found.values())


def _fleets(here: Parties, alone: Fleet, price: float) -> Result:
    rows, found, held = [], [], held_bytes(here)
    message = here.batch["attention_mask"].numel() * here.source.anatomy.hidden * 2  # bfloat16
    for name, (own, bandwidth, latency, share) in KNOWN.items():
        fleet = replace(alone, own=own, bandwidth=bandwidth, latency=latency, message=message)
        for clients in (10**2, 10**3, 10**4, 10**5, 10**6):
            awake = max(1, round(clients * share))
            most = max(1, math.floor(BUSY * fleet.cycle / (fleet.forward + fleet.backward)))  # clients of a server
            servers = math.ceil(awake / most)
            each = math.ceil(awake / servers)  # of the fullest; the others have fewer
            seen = simulate(fleet, each)
            flying, rate = float(np.percentile(seen.in_flight, 99)), seen.rate * awake / each
            row = {
                "fleet": name, "clients": clients, "awake": awake, "steps": rate, "servers": servers, "busy": seen.busy,
                "megabits": rate * 2 * 8 * message / 1e6, "in_flight": flying, "held_bytes": flying * held,
                "versions": seen.versions, "price": servers * price,
            }  # fmt: skip
            found.append(row)
            rows.append([
                name, f"{clients:,}", f"{awake:,}", f"{rate:,.0f}", f"{row['megabits']:,.0f}", f"{servers:,}",
                f"{seen.busy:.0%}", f"{flying:.0f}", f"{flying * held / 1e6:.0f}", str(seen.versions),
                f"{row['price']:,.1f}",
            ])  # fmt: skip
    facts = {"message_bytes": message, "held_bytes": held, "fleets": found}
    notes = [alone_line(alone), f"a message has {message:,} bytes, a forward holds {held:,}"]
    return Result(facts | alone_facts(alone), rows, FLEETS, notes)
