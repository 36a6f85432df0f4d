"""``python -m benchmarks``: measurements of this machine, as ratios where something is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands import links as bench_links
from benchmarks.commands import plan as bench_plan
from benchmarks.commands import server as bench_server
from benchmarks.commands.common import Cut, Json, Kind, Model, Pairs, Threads, cut_of, prepared, show
from flexp.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Measure what splitting costs and saves on this machine, and check the baselines."
)


app.command("link")(bench_links.link)
app.command("inference")(bench_links.inference)
app.command("codec")(bench_links.codec)
app.command("slow-link")(bench_links.slow_link)
app.command("chaos")(bench_server.chaos)
app.command("soak")(bench_server.soak)
app.command("server-scaling")(bench_server.server_scaling)
app.command("fuzz")(bench_server.fuzz)
app.command("plan")(bench_plan.plan)
app.command("predict")(bench_plan.predict)
app.command("recut")(bench_plan.recut)


@app.command("split-overhead")
def split_overhead(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Cut = None,
    pairs: Pairs = 20,
    tuning: Annotated[str, typer.Option(help="full or lora.")] = "full",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 64,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Split step ÷ whole step, in one process."""
    from benchmarks.overhead import split_overhead as bench

    result = bench(
        prepared(model, threads), kind, cut=cut_of(cut), pairs=pairs, tuning=tuning, dtype=dtype,
        examples=examples, length=length,
    )  # fmt: skip
    low, high = result["ratio_quartiles"]
    show(
        result | {"model": model},
        as_json,
        [
            ("split ÷ whole (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("whole step", f"{1e3 * result['whole_seconds']:.1f} ms"),
            ("split step", f"{1e3 * result['split_seconds']:.1f} ms"),
        ],
    )


@app.command("mixed-precision")
def mixed_precision(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    pairs: Pairs = 20,
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 32,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """A step with matrix products in bfloat16 ÷ one in float32."""
    from benchmarks.mixed_precision import mixed_precision as bench

    result = bench(prepared(model, threads), kind, pairs=pairs, examples=examples, length=length)
    low, high = result["ratio_quartiles"]
    show(
        result | {"model": model},
        as_json,
        [
            ("mixed ÷ float32 (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("float32 step", f"{1e3 * result['float32_seconds']:.1f} ms"),
            ("mixed step", f"{1e3 * result['mixed_seconds']:.1f} ms"),
        ],
    )


@app.command("stage-memory")
def stage_memory(
    hidden: Annotated[int, typer.Option(min=64, help="Width of the model that is measured.")] = 768,
    vocabulary: Annotated[int, typer.Option(min=256, help="Its tokens; the client holds their embedding.")] = 2048,
    as_json: Json = False,
) -> None:
    """Memory of a client with 2 + 1 of 24 blocks ÷ the whole model's: loading, and full tuning."""
    from benchmarks.stage_memory import stage_memory as bench

    result = bench(hidden=hidden, vocabulary=vocabulary)
    rows = [("model", f"{result['model']}, {result['model_bytes'] / 1e6:.0f} MB")]
    for what, ratio in (("loaded", "load_ratio"), ("peak", "tuning_ratio")):
        client, whole = result["client"][what] / 1e6, result["whole"][what] / 1e6
        name = "loading" if what == "loaded" else "full tuning"
        rows.append((f"{name}: client ÷ whole", f"{100 * result[ratio]:.1f} %  ({client:.0f} of {whole:.0f} MB)"))
    show(result, as_json, rows)


@app.command("embeddings")
def embeddings(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Cut = None,
    pairs: Pairs = 20,
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 32,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Token embeddings that stay in their file ÷ in memory: a client's peak memory, the whole model's, and a step."""
    from benchmarks.embeddings import embeddings as bench

    result = bench(
        prepared(model, threads), kind, cut=cut_of(cut) or (1, None), pairs=pairs, examples=examples, length=length
    )
    low, high = result["ratio_quartiles"]
    sizes = {who: {where: result[who][where] / 1e6 for where in ("memory", "file")} for who in ("client", "whole")}
    client, whole = sizes["client"], sizes["whole"]
    show(
        result | {"model": model},
        as_json,
        [
            ("the table", f"{result['table_bytes'] / 1e6:.1f} MB"),
            ("a client: memory, file", f"{client['memory']:.1f}, {client['file']:.1f} MB"),
            ("the whole model: memory, file", f"{whole['memory']:.1f}, {whole['file']:.1f} MB"),
            ("client with file ÷ whole in memory", f"{100 * client['file'] / whole['memory']:.1f} %"),
            ("client ÷ whole, both with file", f"{100 * client['file'] / whole['file']:.1f} %"),
            ("a client's own step: file ÷ memory", f"{result['ratio']:.3f} ({low:.3f} – {high:.3f})"),
            ("in memory; in the file", f"{1e3 * result['memory_seconds']:.1f}; {1e3 * result['file_seconds']:.1f} ms"),
        ],
    )


@app.command("simulated-clients")
def simulated_clients(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    most: Annotated[int, typer.Option(min=2, help="Clients at the end.")] = 100,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Memory and time of 1 to 100 simulated LoRA clients that share one frozen model."""
    from benchmarks.simulated_clients import simulated_clients as bench

    counts = (*(count for count in (1, 2, 5, 10, 20, 50) if count < most), most)
    result = bench(prepared(model, threads), kind, counts=counts)
    rows = [
        (
            f"{row['clients']} clients",
            f"{row['bytes'] / 1e6:.1f} MB, {1e3 * row['step_seconds']:.0f} ms a step",
        )
        for row in result["rows"]
    ]
    rows.append(("each further client", f"{result['bytes_per_client'] / 1e6:.2f} MB"))
    rows.append(("its personal parameters", f"{result['personal_parameters']:.0f}"))
    rows.append(("the whole model", f"{result['model_bytes'] / 1e6:.0f} MB"))
    show(result | {"model": model}, as_json, rows)


@app.command("pfl")
def pfl(
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with the four files of Fashion-MNIST or MNIST, or asset:digits. Default: where Debian's "
            "package dataset-fashion-mnist puts them."
        ),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Again for each; default: all that can run.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Epochs of every client.")] = 10,
    every: Annotated[int, typer.Option(min=1, help="Score after every so many rounds.")] = 1,
    partition: Annotated[
        str, typer.Option(help="dirichlet (0.1) or pathological (two labels a client).")
    ] = "dirichlet",
    seed: Annotated[int, typer.Option(help="Of initial weights and batches; the clients stay.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores and states; a run that is there already is gone on with.")
    ] = None,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """The baselines on PFLlib's image task, beside the accuracy that it published."""
    import torch

    from benchmarks.pfl import NAMES
    from benchmarks.pfl import pfl as bench

    if partition not in ("dirichlet", "pathological"):
        raise ConfigError(f"--partition {partition}: expected dirichlet or pathological")
    torch.set_num_threads(threads)
    result = bench(
        data, method or NAMES, rounds=rounds, every=every, rule=cast(Any, partition), seed=seed, out=out,
        say=None if as_json else lambda line: typer.echo(
            f"{line['method']} round {line['round']}: {line['accuracy']:.2f} % ({line['seconds']:.0f} s)"
        ),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(
        title=f"python -m benchmarks pfl: {result['data']}, {result['rule']}, accuracy in %", title_justify="left"
    )
    for column in ("method", "rounds", "best (round)", "last", "published: best of 2,000", "best − published"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result["rows"]:
        given, gap = row["published"], row["difference"]
        table.add_row(
            row["method"], str(row["rounds"]), f"{row['best']:.2f} ({row['best_round']})", f"{row['last']:.2f}",
            "–" if given is None else f"{given[0]:.2f} ± {given[1]:.2f}", "–" if gap is None else f"{gap:+.2f}",
        )  # fmt: skip
    Console().print(table)
    facts = result["machine"]
    typer.echo(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads")
