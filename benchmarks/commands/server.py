"""``python -m benchmarks chaos``, ``soak``, ``server-scaling`` and ``fuzz``: what a server and its clients stand."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.commands.common import Json, show
from flexp.errors import ConfigError, FlexpError


def chaos(
    faults: Annotated[int, typer.Option(min=1, help="In all.")] = 500,
    kills: Annotated[int, typer.Option(min=0, help="Of these: processes killed, the server among them.")] = 20,
    full_disks: Annotated[int, typer.Option(min=0, help="Of these: disks that are full for a second.")] = 5,
    steps: Annotated[int, typer.Option(min=20, help="Of each of the three clients.")] = 2000,
    rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of faults on the network, for each piece.")] = 0.02,
    relayed: Annotated[
        int, typer.Option(min=0, help="Of the faults: frames that come twice, late, or after the next one.")
    ] = 120,
    relay_rate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of these, for each frame.")] = 0.01,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="Of the model; needs --in-flight 1.")] = 0.0,
    in_flight: Annotated[
        int, typer.Option(min=1, max=4, help="Exchanges under way at once; 1: frames keep their order.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of all that goes wrong.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Keep everything there; default: a temporary folder.")] = None,
    as_json: Json = False,
) -> None:
    """Kill, cut, damage and delay while a fleet trains, and compare its weights with an undisturbed run's."""
    from benchmarks.chaos import chaos as bench

    def say(line: str) -> None:
        typer.echo(f"python -m benchmarks chaos: {line}", err=True)

    if dropout and in_flight > 1:
        raise ConfigError("--dropout needs --in-flight 1: with more, what a client draws depends on time")
    if relayed + kills + full_disks > faults:
        raise ConfigError(f"--relayed, --kills and --full-disks are more than --faults {faults}")
    with tempfile.TemporaryDirectory() as spare:
        result = bench(
            out or Path(spare), faults=faults, kills=kills, full_disks=full_disks, steps=steps, rate=rate,
            relayed=relayed, relay_rate=relay_rate, dropout=dropout, in_flight=in_flight, seed=seed, say=say,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
    else:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(result["by_kind"].items()))
        typer.echo(f"{result['faults']} faults in {result['seconds']:.0f} s and {result['steps']} steps: {kinds}")
        typer.echo(
            f"{result['compared']} tensors compared with the undisturbed run's: {len(result['different'])} differ"
        )
    if result["different"]:
        raise FlexpError(f"the weights are not those of the undisturbed run: {', '.join(result['different'][:3])}, …")


def soak(
    minutes: Annotated[float, typer.Option(min=0.05, help="How long.")] = 30.0,
    clients: Annotated[int, typer.Option(min=1, help="That come and go.")] = 6,
    as_json: Json = False,
) -> None:
    """A server for a long time, with clients that come, leave and vanish; does its memory stay flat?"""
    from benchmarks.soak import soak as bench

    with tempfile.TemporaryDirectory() as folder:
        result = bench(
            Path(folder),
            minutes=minutes,
            clients=clients,
            say=lambda line: typer.echo(f"python -m benchmarks soak: {line}", err=True),
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{result['sessions']} sessions, {result['steps']} steps, {result['vanished']} vanished in the middle of a step"
    )
    typer.echo(
        f"server's memory: {result['second_quarter_bytes'] / 1e6:.1f} MB in the second quarter, "
        f"{result['last_quarter_bytes'] / 1e6:.1f} MB in the last: {100 * result['growth']:+.1f} %"
    )


def server_scaling(
    model: Annotated[str, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")] = "asset:minilm-l6",
    kind: Annotated[str, typer.Option(help="causal-lm or sequence-classification.")] = "sequence-classification",
    counts: Annotated[str, typer.Option(help="How many clients, with commas.")] = "1,2,4,8,16",
    seconds: Annotated[float, typer.Option(min=0.5, help="For each.")] = 10.0,
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 1,
    as_json: Json = False,
) -> None:
    """Tokens a second, latency and memory of one server with 1 to 16 clients, against in-process clients in turn."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from benchmarks.scaling import server_scaling as bench
    from flexp.assets import resolve

    torch.set_num_threads(threads)
    result = bench(
        str(resolve(model)), kind, counts=[int(count) for count in counts.split(",")], seconds=seconds,
        examples=examples, length=length,
        say=lambda row: None if as_json else typer.echo(f"{row['clients']} clients: {row['ratio']:.3f}", err=True),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title=f"python -m benchmarks server-scaling: {model}", title_justify="left")
    for column in ("clients", "tokens/s", "in process", "ratio", "p50 ms", "p90 ms", "p99 ms", "memory MB", "versions"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["clients"]), f"{row['tokens_per_second']:.0f}", f"{row['in_process_tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}", *(f"{1e3 * row[key]:.0f}" for key in ("p50_seconds", "p90_seconds", "p99_seconds")),
            f"{row['memory_bytes'] / 1e6:.0f}", str(row["peak_versions"]),
        )  # fmt: skip
    Console().print(table)


def fuzz(
    frames: Annotated[int, typer.Option(min=100, help="How many inputs.")] = 1_000_000,
    engine: Annotated[
        str | None,
        typer.Option(help="coverage (needs pip install atheris) or blind. Default: the first that is there."),
    ] = None,
    seed: Annotated[int, typer.Option(min=1, help="Of the changes.")] = 1,
    as_json: Json = False,
) -> None:
    """Bad frames and bad handshakes for a tiny server: no crash, no growth of memory, no effect on the weights."""
    from benchmarks.fuzz import fuzz as bench

    result = bench(frames, engine=engine, seed=seed)
    counts = result["counts"]
    show(
        result,
        as_json,
        [
            ("engine", result["engine"] + (f", {result['branches']} branches" if result["branches"] else "")),
            ("inputs", f"{result['frames']} in {result['seconds']:.0f} s ({result['cpu_seconds']:.0f} s of CPU)"),
            ("refused as frames", str(counts.get("refused", 0))),
            ("denied with a reason", str(counts.get("denied", 0))),
            ("answered", str(counts.get("answered", 0))),
            ("handshakes", str(counts.get("handshake", 0))),
            ("growth of memory after a quarter", f"{result['growth'] / 1e6:+.1f} MB"),
            ("weights", "unchanged" if result["weights_unchanged"] else "CHANGED"),
            ("findings", str(counts.get("findings", 0))),
        ],
    )
    for what, data in result["findings"].items():
        typer.echo(f"{what}: {data}", err=True)
    if result["findings"] or not result["weights_unchanged"]:
        raise typer.Exit(1)
