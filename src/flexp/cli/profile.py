"""``flexp profile``: what this machine has, as a small file that can be carried to where plans are made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flexp.cli.settings import Device, Force, console
from flexp.cli.verify import Dtype, Tuning
from flexp.errors import ConfigError
from flexp.kinds import ModelKind

if TYPE_CHECKING:
    from flexp.cost.profile import Profile


def profile(
    model: Annotated[str, typer.Argument(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")],
    kind: Annotated[ModelKind, typer.Option(help="What the model is for.")] = "causal-lm",
    side: Annotated[
        Literal["client", "server"], typer.Option("--as", help="A client has the model's ends; a server has blocks.")
    ] = "client",
    batch: Annotated[int, typer.Option(min=1, help="Examples of an exchange; a quarter is measured too.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of an example.")] = 128,
    labels: Annotated[int, typer.Option(min=2, help="Classes, of classifiers.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = "float32",
    autocast: Annotated[bool, typer.Option("--autocast", help="Compute matrix products in bfloat16.")] = False,
    tuning: Annotated[Tuning, typer.Option(help="Everything, or adapters.")] = "full",
    rank: Annotated[int, typer.Option(min=1, help="LoRA: rank of the adapters.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Torch's threads.", show_default=False)] = None,
    server: Annotated[
        str | None, typer.Option(metavar="[NAME@]HOST:PORT", help="Measure the network to this `flexp server`.")
    ] = None,
    like: Annotated[
        str, typer.Option("--class", help="Device class whose network (and watts) stand where nothing is measured.")
    ] = "laptop",
    uplink: Annotated[float | None, typer.Option(min=0.001, help="Mbit/s up, if you know.")] = None,
    downlink: Annotated[float | None, typer.Option(min=0.001, help="Mbit/s down, if you know.")] = None,
    latency: Annotated[float | None, typer.Option(min=0.0, help="ms one way, if you know.")] = None,
    memory: Annotated[int | None, typer.Option(min=1, help="MiB that training may use, if not all.")] = None,
    probe: Annotated[
        bool, typer.Option(help="Measure in a process of its own what memory is no tensor (a client's).")
    ] = True,
    name: Annotated[str, typer.Option(help="Of the device.")] = "device",
    out: Annotated[Path | None, typer.Option(help="Save the profile here, as JSON.")] = None,
    force: Force = False,
    device: Device = None,
) -> None:
    """Measure this machine: usable memory, seconds of the model's blocks forward and backward, and the network."""
    import torch
    from rich.console import Console

    from flexp.config import ModelConfig
    from flexp.cost.device import cores, host_bytes, training_memory
    from flexp.cost.measure import flops_per_second, measure_model
    from flexp.cost.model_cost import model_cost
    from flexp.cost.profile import Profile
    from flexp.files import check_new
    from flexp.machine import device_of

    check_new(out, force=force)
    for option, value in (("--uplink", uplink), ("--downlink", downlink), ("--latency", latency)):
        if value is not None and not math.isfinite(value):  # before anything is measured
            raise ConfigError(f"{option} {value}: expected a number")
    place = str(device_of(device or "cpu"))
    if threads is not None:
        torch.set_num_threads(threads)
    ready = Profile.from_class(like, role=side)
    limit = None if memory is not None else training_memory(torch.get_num_threads(), place)
    wanted = ModelConfig.of(model, dtype=dtype, autocast="bfloat16" if autocast else "off").on(place)
    cost = model_cost(wanted, kind, length=length, labels=labels)
    with Console(stderr=True).status("measuring"):
        measured = measure_model(
            cost,
            role=side,
            examples=batch,
            rank=rank if tuning == "lora" else None,
            memory_too=probe,
        )
        network = {}
        if server is not None:
            network = _network(server, cost, batch, tuning)
    given = {
        "uplink_bps": None if uplink is None else 1e6 * uplink,
        "downlink_bps": None if downlink is None else 1e6 * downlink,
        "latency_s": None if latency is None else 1e-3 * latency,
    }
    network |= {key: value for key, value in given.items() if value is not None}
    figures = ready.model_dump() | {
        "name": name,
        "memory_bytes": max(1, limit.free_bytes) if limit is not None else (memory or 0) * 2**20,
        "memory_from": limit.name if limit is not None else "--memory",
        "host_bytes": host_bytes(torch.get_num_threads(), place),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "flops": flops_per_second(measured),
        "measured": [measured.model_dump()],
        "link_from": _link_from(server, given, like),
    }
    found = Profile.model_validate(figures | network)
    _print(found)
    if out is not None:
        found.write(out)
        typer.echo(f"saved in {out}")


def _network(server: str, cost: object, examples: int, tuning: str) -> dict[str, float]:
    from secrets import token_hex

    from flexp.cost.link import measure_link
    from flexp.links.opening import as_link, connected

    scheme, _, place = server.rpartition("://")
    if "@" not in place:
        place = f"profile-{token_hex(4)}@{place}"  # nobody's name: a server has one client of a name
    with connected(as_link(f"{scheme or 'grpc'}://{place}")) as link:
        measured = measure_link(link, cost, examples=examples, tuning=tuning)  # type: ignore[arg-type]
    return {
        "uplink_bps": measured.uplink_bps,
        "downlink_bps": measured.downlink_bps,
        "latency_s": measured.latency_s,
    }


def _link_from(server: str | None, given: dict[str, float | None], like: str) -> str:
    told = [key for key, value in given.items() if value is not None]
    rest = "measured" if server is not None else f"device class {like}"
    if len(told) == len(given):
        return "options"
    return f"{rest}; {', '.join(told)} from options" if told else rest


def _print(found: Profile) -> None:
    from rich.table import Table

    measured = found.measured[0]
    shape = max(measured.shapes, key=lambda item: item.examples)
    rate = "full tuning" if measured.rank is None else f"LoRA of rank {measured.rank}"
    table = Table(title=f"{found.name}, as a {found.role}: {measured.name}, {rate}", title_justify="left")
    for column in ("what", "measured"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("memory that training may use", f"{found.memory_bytes / 2**20:,.0f} MiB ({found.memory_from})")
    if found.host_bytes is not None:
        table.add_row("of the machine itself", f"{found.host_bytes / 2**20:,.0f} MiB")
    if measured.overhead_bytes is not None:
        table.add_row("of it no tensors", f"{measured.overhead_bytes / 2**20:.0f} MiB")
    table.add_row("cores, threads", f"{found.cores}, {found.threads}")
    table.add_row("batch × length", f"{shape.examples} × {measured.length}, {measured.dtype}")
    ends = [("embeddings", shape.embed), ("head and loss", shape.head)] if found.role == "client" else []
    distinct = list({block.model_dump_json(): block for block in shape.blocks}.values())
    blocks = [("a block" if len(distinct) == 1 else f"a block, kind {n + 1}", b) for n, b in enumerate(distinct)]
    for label, piece in [*blocks, *ends]:
        table.add_row(label, f"{1e3 * piece.forward:.2f} ms forward, {1e3 * piece.backward:.2f} ms backward")
    table.add_row("optimiser", f"{1e9 * measured.update:.2f} ns a parameter")
    table.add_row("sustained", f"{found.flops / 1e9:.1f} GFLOP/s")
    table.add_row("up, down", f"{found.uplink_bps / 1e6:,.1f}, {found.downlink_bps / 1e6:,.1f} Mbit/s")
    table.add_row("latency, one way", f"{1e3 * found.latency_s:.2f} ms")
    table.add_row("network from", found.link_from)
    console().print(table)


COMMANDS = {"profile": profile}
