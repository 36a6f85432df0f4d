"""``flexp bench``: measurements of this machine, as ratios where something is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from flexp.cli import bench_links, bench_plan, bench_server
from flexp.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Measure what splitting costs and saves on this machine, and check the baselines."
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[str, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")]
Kind = Annotated[str, typer.Option(help="causal-lm, sequence-classification or image-classification.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")]

app.command("codec")(bench_links.codec)
app.command("slow-link")(bench_links.slow_link)
app.command("chaos")(bench_server.chaos)
app.command("soak")(bench_server.soak)
app.command("server-scaling")(bench_server.server_scaling)
app.command("plan")(bench_plan.plan)


@app.command("split-overhead")
def split_overhead(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Annotated[str | None, typer.Option(metavar="S:E", help="Default: 1:L.")] = None,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of steps.")] = 20,
    tuning: Annotated[str, typer.Option(help="full or lora.")] = "full",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 64,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Split step ÷ whole step, in one process."""
    from flexp.bench.overhead import split_overhead as bench

    result = bench(
        _prepared(model, threads), kind, cut=_cut(cut), pairs=pairs, tuning=tuning, dtype=dtype,
        examples=examples, length=length,
    )  # fmt: skip
    low, high = result["ratio_quartiles"]
    _print(
        result | {"model": model},
        as_json,
        [
            ("split ÷ whole (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("whole step", f"{1e3 * result['whole_seconds']:.1f} ms"),
            ("split step", f"{1e3 * result['split_seconds']:.1f} ms"),
        ],
    )


@app.command("link")
def link(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    cut: Annotated[str | None, typer.Option(metavar="S:E", help="Default: 1:L.")] = None,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of steps.")] = 12,
    tuning: Annotated[str, typer.Option(help="full or lora.")] = "full",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 32,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """A step over gRPC on this machine ÷ one inside the process."""
    from flexp.bench.link import link_overhead as bench

    result = bench(
        _prepared(model, threads), kind, cut=_cut(cut), pairs=pairs, tuning=tuning, dtype=dtype,
        examples=examples, length=length,
    )  # fmt: skip
    low, high = result["ratio_quartiles"]
    _print(
        result | {"model": model},
        as_json,
        [
            ("gRPC ÷ in-process (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("in-process step", f"{1e3 * result['in_process_seconds']:.1f} ms"),
            ("gRPC step", f"{1e3 * result['grpc_seconds']:.1f} ms"),
            ("bytes of a step", f"{result['tensor_bytes']} of tensors, {result['header_bytes']} besides"),
        ],
    )


@app.command("inference")
def inference(
    model: Annotated[
        str | None, typer.Option(help="Default: a Llama of random weights, as the next three say.")
    ] = None,
    hidden: Annotated[int, typer.Option(min=64, help="Width; a multiple of 64.")] = 512,
    blocks: Annotated[int, typer.Option(min=3)] = 8,
    vocabulary: Annotated[int, typer.Option(min=256)] = 8192,
    cut: Annotated[str | None, typer.Option(metavar="S:E", help="Default: 1:L-1.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens to go on from.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of answers.")] = 8,
    round_trip: Annotated[float, typer.Option(min=0.0, help="Of the slow network, in milliseconds.")] = 50.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Tokens a second of a split model ÷ those of the whole one; and on a slow network."""
    import torch

    from flexp.bench.inference import inference as bench

    torch.set_num_threads(threads)
    result = bench(
        None if model is None else _prepared(model, threads), hidden=hidden, blocks=blocks, vocabulary=vocabulary,
        cut=_cut(cut), prompt=prompt, tokens=tokens, pairs=pairs, round_trip=round_trip / 1e3, dtype=dtype,
    )  # fmt: skip
    low, high = result["ratio_quartiles"]
    _print(
        result if model is None else result | {"model": model},
        as_json,
        [
            ("split ÷ whole, tokens a second (median of pairs)", f"{result['ratio']:.3f}"),
            ("quartiles", f"{low:.3f} – {high:.3f}"),
            ("processor time, whole ÷ split", f"{result['cpu_ratio']:.3f}"),
            ("whole model", f"{result['whole_tokens_per_second']:.1f} tokens a second"),
            ("split, loopback", f"{result['split_tokens_per_second']:.1f} tokens a second"),
            (f"split, round trip {round_trip:g} ms", f"{result['slow_tokens_per_second']:.1f} tokens a second"),
            ("the same tokens", "yes" if result["same_tokens"] else "NO"),
        ],
    )


@app.command("mixed-precision")
def mixed_precision(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of steps.")] = 20,
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=1)] = 32,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """A step with matrix products in bfloat16 ÷ one in float32."""
    from flexp.bench.mixed_precision import mixed_precision as bench

    result = bench(_prepared(model, threads), kind, pairs=pairs, examples=examples, length=length)
    low, high = result["ratio_quartiles"]
    _print(
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
    from flexp.bench.stage_memory import stage_memory as bench

    result = bench(hidden=hidden, vocabulary=vocabulary)
    rows = [("model", f"{result['model']}, {result['model_bytes'] / 1e6:.0f} MB")]
    for what, ratio in (("loaded", "load_ratio"), ("peak", "tuning_ratio")):
        client, whole = result["client"][what] / 1e6, result["whole"][what] / 1e6
        name = "loading" if what == "loaded" else "full tuning"
        rows.append((f"{name}: client ÷ whole", f"{100 * result[ratio]:.1f} %  ({client:.0f} of {whole:.0f} MB)"))
    _print(result, as_json, rows)


@app.command("predict")
def predict(
    model: Annotated[list[str] | None, typer.Option(help="bert, llama or gpt2; again for each. Default: all.")] = None,
    examples: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(min=2)] = 64,
    tuning: Annotated[str, typer.Option(help="full or lora.")] = "full",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Checkpoint the client's blocks.")] = False,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Predicted against measured: a client's peak memory and a step's time, for five cuts of three architectures."""
    import torch

    from flexp.bench.predictions import MODELS, error
    from flexp.bench.predictions import predictions as bench

    for name in model or ():
        if name not in MODELS:
            raise ConfigError(f"--model {name}: expected one of {', '.join(MODELS)}")
    torch.set_num_threads(threads)
    result = bench(
        models=model or tuple(MODELS), examples=examples, length=length, tuning=tuning, checkpointing=checkpointing,
        say=None if as_json else typer.echo,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title="flexp bench predict: predicted, measured (error)", title_justify="left")
    for column in ("model", "cut", "peak memory, MB", "client's step, ms", "client + server, ms"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in result["rows"]:
        cells = [
            f"{unit * row[key][0]:.0f}, {unit * row[key][1]:.0f} ({100 * error(row[key]):+.1f} %)"
            for key, unit in (("memory_bytes", 1e-6), ("client_seconds", 1e3), ("seconds", 1e3))
        ]
        table.add_row(row["model"], f"{row['cut'][0]}:{row['cut'][1]}/{row['blocks']}", *cells)
    Console().print(table)
    worst = ", ".join(f"{100 * result['worst'][key]:.1f} %" for key in ("memory_bytes", "client_seconds", "seconds"))
    typer.echo(f"largest errors: {worst}")
    facts = result["machine"]
    typer.echo(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads")


@app.command("simulated-clients")
def simulated_clients(
    model: Model = "asset:minilm-l6",
    kind: Kind = "sequence-classification",
    most: Annotated[int, typer.Option(min=2, help="Clients at the end.")] = 100,
    threads: Threads = 2,
    as_json: Json = False,
) -> None:
    """Memory and time of 1 to 100 simulated LoRA clients that share one frozen model."""
    from flexp.bench.simulated_clients import simulated_clients as bench

    counts = (*(count for count in (1, 2, 5, 10, 20, 50) if count < most), most)
    result = bench(_prepared(model, threads), kind, counts=counts)
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
    _print(result | {"model": model}, as_json, rows)


@app.command("fuzz")
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
    from flexp.bench.fuzz import fuzz as bench

    result = bench(frames, engine=engine, seed=seed)
    counts = result["counts"]
    _print(
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

    from flexp.bench.pfl import NAMES
    from flexp.bench.pfl import pfl as bench

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
    table = Table(title=f"flexp bench pfl: {result['data']}, {result['rule']}, accuracy in %", title_justify="left")
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


def _prepared(model: str, threads: int) -> str:
    import torch

    from flexp.assets import resolve

    torch.set_num_threads(threads)
    return str(resolve(model))


def _cut(text: str | None) -> tuple[int, int | None] | None:
    from flexp.cli.verify import parse_cut

    return None if text is None else parse_cut(text)


def _print(result: dict[str, Any], as_json: bool, rows: list[tuple[str, str]]) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table(title=f"flexp bench {result['bench']}", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    facts = result["machine"]
    typer.echo(f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads")
