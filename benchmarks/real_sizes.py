"""The memory of models of real size: a client, a server and the whole model, whole numbers or quantised, with LoRA.

A checkpoint of the shape is written with random weights, shard by shard (``--folder`` keeps it for the next time); each
party loads it and trains two steps in a process of its own. Predicted, Llama-3.1-8B in nf4: blocks 0.13 GB each instead
of 0.44; embeddings and head, 2.1 GB, stay as they are, so that a client of cut (2, L − 1) is mostly these.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.tools.big_model import SHAPES, server_memory, write_random
from benchmarks.tools.command import Cut, Examples, Length, Result, say
from benchmarks.tools.parties import blocks_of, cut_of, probe
from flexp.config import ModelConfig
from flexp.cost.probe import measure as peak


def measure(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    quantization: Annotated[str, typer.Option(help="Some of off, int8, nf4, with commas.")] = "off,nf4",
    embeddings: Annotated[str, typer.Option(help="Of the client's: memory, or file.")] = "memory",
    cut: Cut = None,
    examples: Examples = 1,
    length: Length = 512,
    whole: Annotated[
        bool, typer.Option(help="Also the whole model, as the same tuning without a split has it.")
    ] = True,
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoint is, or is to stay.")] = None,
) -> Result:
    """Peak memory of loading and of LoRA steps: client, server, and whole model, in bfloat16 and quantised."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        model = write_random(shape, Path(place))
        blocks = blocks_of(str(model))
        where = cut_of(cut, blocks, (2, blocks - 1))
        found: dict[str, Any] = {}
        for how in quantization.split(","):
            config = ModelConfig.of(model, dtype="bfloat16", tuning="lora", quantization=how)
            own = config.model_copy(update={"embeddings": embeddings})
            say(f"{how}: a client")
            client = peak(replace(probe(own, "causal-lm", where, examples, length), steps=2), timeout=3600)
            say(f"{how}: the server")
            served = server_memory(config, where, examples, length)
            found[how] = {"client": vars(client), "server": served}
            if whole:
                say(f"{how}: the whole model")
                one = replace(probe(config, "causal-lm", None, examples, length), steps=2)
                found[how]["whole"] = vars(peak(one, timeout=3600))
    rows = []
    for how, of in found.items():
        for party, figures in of.items():
            share = f"{100 * figures['peak'] / of['whole']['peak']:.1f} %" if whole else ""
            rows.append((f"{how}: {party}", *(f"{figures[key] / 1e6:,.0f} MB" for key in ("loaded", "peak")), share))
    facts = {"shape": shape, "cut": list(where), "batch": [examples, length], "embeddings": embeddings, **found}
    return Result(facts, rows, ("party", "loading", "two steps of LoRA", "of the whole"))
