"""The memory of a client that holds 2 + 1 of 24 blocks, against the whole model's.

A client always holds the ends, so the model's vocabulary is kept small here: with a large one its embedding, not the
blocks, decides (``--vocabulary``). A GPT-2 of 24 blocks with random weights is written to a temporary folder; client
and whole model are each loaded and tuned in a process of their own (:mod:`flexp.cost.probe`). Predicted: loading
3/24 of the blocks and both ends, so about 14 %; tuning below 20 %, since the activations of 21 blocks, their gradients
and optimiser states are gone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import transformers
import typer

from benchmarks.tools.command import Result
from benchmarks.tools.parties import probe, random_model
from flexp.config import ModelConfig
from flexp.cost.probe import measure as peak

BLOCKS, CUT = 24, (2, 23)
EXAMPLES, LENGTH = 4, 64


def measure(
    hidden: Annotated[int, typer.Option(min=64, help="Width of the model that is measured.")] = 768,
    vocabulary: Annotated[int, typer.Option(min=256, help="Its tokens; the client holds their embedding.")] = 2048,
) -> Result:
    """Memory of a client with 2 + 1 of 24 blocks ÷ the whole model's: loading, and full tuning."""
    config = transformers.GPT2Config(
        n_layer=BLOCKS, n_embd=hidden, n_head=hidden // 64, vocab_size=vocabulary, n_positions=512, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with random_model("causal-lm", config) as folder:
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        client, whole = (peak(probe(ModelConfig(id=folder), "causal-lm", cut, EXAMPLES, LENGTH)) for cut in (CUT, None))
    name = f"GPT-2, {BLOCKS} blocks, H = {hidden}, {vocabulary} tokens, float32, random weights"
    rows = [("model", f"{name}, {size / 1e6:.0f} MB")]
    for what, own, all_of_it in (
        ("loading", client.loaded, whole.loaded),
        ("full tuning", client.peak, whole.peak),
    ):
        share = f"{100 * own / all_of_it:.1f} %  ({own / 1e6:.0f} of {all_of_it / 1e6:.0f} MB)"
        rows.append((f"{what}: client ÷ whole", share))
    facts = {
        "model": name, "model_bytes": size, "cut": list(CUT), "batch": [EXAMPLES, LENGTH],
        "client": vars(client), "whole": vars(whole),
        "load_ratio": client.loaded / whole.loaded, "tuning_ratio": client.peak / whole.peak,
    }  # fmt: skip
    return Result(facts, rows)
