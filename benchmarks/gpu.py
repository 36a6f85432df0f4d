"""What FlexP does on a GPU, or whatever computes here: in one script of 8 minutes, for whoever has such a machine.

For each shape, with random weights made on the device (LoRA, bfloat16, cut (2, L − 1)): a split step beside a whole
one, the device's peak memory in both, how often the host waits for the device in each, and tokens a second of 1, 4 and
16 clients: in this process in turn, and each in a thread of its own over gRPC, answered one by one and together
(``server.joined``). Where there are several GPUs, also a step whose server is spread over all of them
(``server.device``) beside one whose is not. What would end after ``--minutes`` is not begun. ``--json`` prints
:class:`Figures`, whose schema ``--schema`` prints: send it in.

Predicted: split ÷ whole 1.0–1.1 at 512 tokens, since nothing waits but the copies of the messages, some of which are
copies within the device here; several clients get through no more tokens than one, since one thread answers them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel, ConfigDict
from torch.profiler import ProfilerActivity, profile

from benchmarks.server_scaling import in_process, over_grpc
from benchmarks.tools.big_model import SHAPES
from benchmarks.tools.command import Examples, Length, Pairs, Result, say
from benchmarks.tools.paired import WARM_UP, paired
from benchmarks.tools.parties import Parties, Step, cut_of, probe
from flexp.config import ModelConfig, OptimizerConfig, ServerConfig
from flexp.cost.echo import random_batch
from flexp.machine import device_of, versions
from flexp.models.heads import AUTO
from flexp.models.stage import Stage

KIND = "causal-lm"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""What the profiler calls it when the host waits for the device."""


class Clients(BaseModel):
    """So many clients of one server: tokens a second in turn in one process, and over gRPC with a thread each, one by
    one and joined; the median and the last percentile of a step's seconds one by one, and the largest number of weight
    versions."""

    model_config = ConfigDict(extra="forbid")
    clients: int
    in_turn_tokens_per_second: float
    grpc_tokens_per_second: float
    joined_tokens_per_second: float
    grpc_p50_seconds: float
    grpc_p99_seconds: float
    versions: int


class Shape(BaseModel):
    """One model. Memory is in bytes, at the device's peak; ``None`` where the device has no allocator that tells.
    ``waits``: how often the host waits for the device in a step. ``spread_ratio``: a split step whose server is on all
    ``gpus`` ÷ one whose is on one; ``None`` where there is one at most, or no room, as ``left_out`` says."""

    model_config = ConfigDict(extra="forbid")
    shape: str
    cut: tuple[int, int]
    parameters: int
    ratio: float
    ratio_quartiles: tuple[float, float]
    whole_seconds: float
    split_seconds: float
    weights_bytes: int
    whole_bytes: int | None
    split_bytes: int | None
    whole_waits: int | None
    split_waits: int | None
    gpus: int
    spread_ratio: float | None
    clients: list[Clients]


class Figures(BaseModel):
    """All of it, what it was measured on and how long that took. ``left_out``: shapes and numbers of clients for which
    there was no time, or no room; and why no server was spread."""

    model_config = ConfigDict(extra="forbid")
    bench: str
    device: str
    batch: tuple[int, int]
    shapes: list[Shape]
    left_out: dict[str, str]
    seconds: float
    versions: dict[str, str]
    machine: dict[str, Any]


def measure(
    device: Annotated[str, typer.Option(help="As for --device: auto, cpu, cuda:1, …")] = "auto",
    shapes: Annotated[str, typer.Option(help=f"Some of {', '.join(SHAPES)}.")] = "llama-3.2-1b,llama-3.1-8b",
    counts: Annotated[str, typer.Option(help="How many clients, with commas.")] = "1,4,16",
    examples: Examples = 4,
    length: Length = 512,
    pairs: Pairs = 10,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each number of clients, each way.")] = 8.0,
    minutes: Annotated[float, typer.Option(help="That all of it takes at most.")] = 8.0,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the result's JSON schema and measure nothing.")
    ] = False,
) -> Result:
    """Split and whole steps, memory, host waits and clients of models of real size, on a GPU or what is here."""
    if schema:
        typer.echo(json.dumps(Figures.model_json_schema(), indent=1))
        raise typer.Exit
    place, began = device_of(device), time.monotonic()
    places = several(place)
    found: list[Shape] = []
    left_out: dict[str, str] = {}
    if len(places) < 2:
        left_out["several GPUs"] = f"there is no second one beside {place}"
    clock = Clock(began + 60 * minutes, left_out)
    for name in shapes.split(","):
        say(f"{name}: on {place}")
        try:
            one = _measured(name, place, [int(count) for count in counts.split(",")], examples, length, pairs, seconds,
                            clock)  # fmt: skip
            if one is None:
                continue
            found.append(one)
            if len(places) > 1 and clock.has(4 * pairs * one.split_seconds, f"{name} on several GPUs"):
                one.spread_ratio, one.gpus = _spread(name, place, places, examples, length, pairs), len(places)
        except torch.OutOfMemoryError as error:
            left_out[name] = str(error).splitlines()[0]
    facts = {
        "device": str(place), "batch": [examples, length], "shapes": [one.model_dump(mode="json") for one in found],
        "left_out": left_out, "seconds": time.monotonic() - began, "versions": versions(),
    }  # fmt: skip
    notes = [f"{name} was left out: {why}" for name, why in left_out.items()]
    return Result(facts, [row for one in found for row in _rows(one)], notes=notes)


@dataclass(frozen=True)
class Clock:
    """When all is to be over, on the monotonic clock, and what was left out for that."""

    end: float
    left_out: dict[str, str]

    def has(self, seconds: float, what: str) -> bool:
        """Whether there are so many seconds left for it."""
        left = self.end - time.monotonic()
        if left < seconds:
            self.left_out[what] = f"no time was left: {max(left, 0):.0f} s, and it takes {seconds:.0f}"
        return left >= seconds


def _measured(
    name: str, place: torch.device, counts: list[int], examples: int, length: int, pairs: int, seconds: float,
    clock: Clock,
) -> Shape | None:  # fmt: skip
    if not clock.has(2 * seconds, name):
        return None
    here = _parties(name, place, examples, length)
    whole = here.whole()
    plain = {"whole": here.step(whole, whole.model.train()), "split": here.split_step()}
    steps = {way: _through(step, place) for way, step in plain.items()}
    began = time.monotonic()
    steps["whole"](), steps["split"]()
    once = time.monotonic() - began
    if not clock.has((pairs + WARM_UP) * once, name):
        return None
    timed = paired(steps["whole"], steps["split"], pairs)
    peaks = {way: _peak(step, place) for way, step in steps.items()}
    waits = {way: _waits(step, place) for way, step in plain.items()}
    clients = []
    for count in counts:
        if not clock.has(3 * seconds + 4 * count * once, f"{name}, {count} clients"):
            continue
        near, far = in_process(here, count, seconds), over_grpc(here, count, seconds)
        joined = over_grpc(here, count, seconds, ServerConfig(joined=True))
        clients.append(
            Clients(
                clients=count,
                in_turn_tokens_per_second=near * examples * length,
                grpc_tokens_per_second=far["steps"] * examples * length,
                joined_tokens_per_second=joined["steps"] * examples * length,
                grpc_p50_seconds=far["p50_seconds"],
                grpc_p99_seconds=far["p99_seconds"],
                versions=far["peak_versions"],
            )
        )
    weights = list(here.source.model.parameters())
    return Shape(
        shape=name,
        cut=here.cut,
        parameters=sum(value.numel() for value in weights),
        ratio=timed.ratio,
        ratio_quartiles=(timed.quartiles[0], timed.quartiles[1]),
        whole_seconds=timed.first,
        split_seconds=timed.second,
        weights_bytes=sum(value.numel() * value.element_size() for value in weights),
        whole_bytes=peaks["whole"],
        split_bytes=peaks["split"],
        whole_waits=waits["whole"],
        split_waits=waits["split"],
        gpus=1 if place.type == "cuda" else 0,
        spread_ratio=None,
        clients=clients,
    )


def several(place: torch.device) -> list[str]:
    """The names of all GPUs of the kind of ``place``; none, where it is no GPU."""
    count = torch.accelerator.device_count() if place.type not in ("cpu", "meta", "mps") else 0
    return [f"{place.type}:{index}" for index in range(count)]


def _spread(name: str, place: torch.device, places: list[str], examples: int, length: int, pairs: int) -> float:
    """A step with a server on all ``places`` ÷ one with a server on one, in turn; after all else of the shape is gone,
    since the blocks that are spread are copies."""
    here = _parties(name, place, examples, length)
    one, all_ = here.split_step(), here.split_step(config=ServerConfig(device=places))
    return paired(_through(one, place), _through(all_, place), pairs).ratio


def _parties(name: str, place: torch.device, examples: int, length: int) -> Parties:
    config = SHAPES[name]()
    config.pad_token_id = 0
    with torch.device(place):
        torch.manual_seed(0)
        model = AUTO[KIND].from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    source = Stage.whole(model)
    wanted = ModelConfig.of(name, dtype="bfloat16", tuning="lora")
    blocks = source.anatomy.blocks
    cut = cut_of(None, blocks, (2, blocks - 1))
    batch = source.placed(random_batch(probe(wanted, KIND, cut, examples, length), config))
    return Parties(source, KIND, cut, batch, "lora", wanted, OptimizerConfig())


def _through(step: Step, place: torch.device) -> Step:
    """The step, and all that it left to the device."""

    def done() -> None:
        step()
        if place.type != "cpu":
            torch.accelerator.synchronize(place)

    return done


def _peak(step: Step, place: torch.device) -> int | None:
    if place.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(place)
    step()
    return int(torch.cuda.max_memory_allocated(place))


def _waits(step: Step, place: torch.device) -> int | None:
    if place.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
    return sum(int(event.count) for event in seen.key_averages() if event.key in WAITS)


def _rows(one: Shape) -> list[tuple[str, str]]:
    def size(value: int | None) -> str:
        return "not known" if value is None else f"{value / 1e6:,.0f} MB"

    rows = [
        (f"{one.shape}: split ÷ whole (median of pairs)", f"{one.ratio:.3f}"),
        ("whole step, split step", f"{1e3 * one.whole_seconds:.1f} ms, {1e3 * one.split_seconds:.1f} ms"),
        ("weights", size(one.weights_bytes)),
        ("peak of a whole, a split step", f"{size(one.whole_bytes)}, {size(one.split_bytes)}"),
        ("host waits of a whole, a split step", f"{one.whole_waits}, {one.split_waits}"),
    ]
    if one.spread_ratio is not None:
        rows.append((f"server on {one.gpus} GPUs ÷ on one", f"{one.spread_ratio:.3f}"))
    for at in one.clients:
        ways = (at.in_turn_tokens_per_second, at.grpc_tokens_per_second, at.joined_tokens_per_second)
        rows.append((
            f"{at.clients} clients, tokens/s: in turn, over gRPC, joined", ", ".join(f"{way:,.0f}" for way in ways)
        ))  # fmt: skip
    return rows
