"""The memory of models of real size: a client, a server and the whole model, whole numbers or quantised, with LoRA.

A checkpoint of the shape is written with random weights, shard by shard (``--folder`` keeps it for the next time); each
party loads it and trains two steps in a process of its own. Predicted, Llama-3.1-8B in nf4: blocks 0.11 GB each instead
of 0.44; embeddings and head, 2.1 GB, stay as they are, so that a client of cut (2, L − 1) is mostly these, unless they
are packed, too (``nf4+ends``: ``model.quantize_ends``), when they are 0.6 GB.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.tools.big_model import SHAPES, server_memory, write_random
from benchmarks.tools.command import Cut, Examples, Length, Result, say
from benchmarks.tools.parties import blocks_of, cut_of, probe
from flexp.config import ModelConfig
from flexp.cost.probe import measure as peak
from flexp.links.codecs import codec_of
from flexp.models.loading import load_config

BF16, CODECS = torch.bfloat16, ("fp32", "bf16", "int8-row", "int4")


def measure(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    quantization: Annotated[
        str, typer.Option(help="Some of off, int8, nf4, int8+ends, nf4+ends, with commas.")
    ] = "off,nf4",
    embeddings: Annotated[str, typer.Option(help="Of the client's: memory, or file.")] = "memory",
    blocks: Annotated[
        int | None, typer.Option(min=2, help="The first of the shape's alone: memory is linear in them.")
    ] = None,
    cut: Cut = None,
    examples: Examples = 1,
    length: Length = 512,
    parties: Annotated[str, typer.Option(help="Which of them, with commas.")] = "client,server,whole",
    steps: Annotated[int, typer.Option(min=1, help="The second has the optimiser's state from the first.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where the checkpoint is, or is to stay.")] = None,
) -> Result:
    """Peak memory of loading and of LoRA steps: client, server, and whole model, in bfloat16 and quantised."""
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        model = write_random(shape, Path(place), blocks)
        depth, hidden = blocks_of(str(model)), load_config(str(model)).get_text_config().hidden_size
        where = cut_of(cut, depth, (2, depth - 1))
        found: dict[str, Any] = {}
        for how in quantization.split(","):
            kind, _, ends = how.partition("+")
            config = ModelConfig.of(
                model, dtype="bfloat16", tuning="lora", quantization=kind, quantize_ends=ends == "ends"
            )
            own = config.model_copy(update={"embeddings": embeddings})
            found[how] = {}
            for party in parties.split(","):
                say(f"{how}: {party}")
                if party == "server":
                    found[how][party] = server_memory(config, where, examples, length)
                    continue
                asked = probe(config, "causal-lm", None, examples, length)
                if party == "client":
                    asked = probe(own, "causal-lm", where, examples, length)
                found[how][party] = vars(peak(replace(asked, steps=steps), timeout=7200))
    rows = []
    for how, of in found.items():
        for party, figures in of.items():
            share = f"{100 * figures['peak'] / of['whole']['peak']:.1f} %" if "whole" in of else ""
            rows.append((f"{how}: {party}", *(f"{figures[key] / 1e6:,.0f} MB" for key in ("loaded", "peak")), share))
    message = (examples, length, hidden)
    facts = {"shape": shape, "cut": list(where), "batch": [examples, length], "embeddings": embeddings, **found}
    crosses = {
        codec: 4 * sum(dtype.itemsize * math.prod(dims) for dtype, dims in codec_of(codec, BF16).layout(message))
        for codec in CODECS
    }
    said = ", ".join(f"{codec} {size / 1e6:.2f}" for codec, size in crosses.items())
    return Result(
        facts | {"crosses": crosses}, rows, ("party", "loading", "steps of LoRA", "of the whole"),
        [f"MB of a step's four messages: {said}"],
    )  # fmt: skip
