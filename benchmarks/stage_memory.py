"""``python -m benchmarks stage-memory``: the memory of a client with 2 + 1 of 24 blocks, against the whole model's.

A client always holds the ends, so the model's vocabulary is kept small here: with a large one its embedding, not the
blocks, decides (``--vocabulary``). A GPT-2 of 24 blocks with random weights is written to a temporary folder; client
and whole model are each loaded and tuned in a process of their own (:mod:`flexp.cost.probe`). Predicted: loading
3/24 of the blocks and both ends, so about 14 %; tuning below 20 %, since the activations of 21 blocks, their gradients
and optimiser states are gone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from flexp.config import ModelConfig, OptimizerConfig
from flexp.cost.probe import Measured, Probe, measure
from flexp.machine import machine
from flexp.models.loading import quietly


def stage_memory(
    *,
    blocks: int = 24,
    hidden: int = 768,
    vocabulary: int = 2048,
    cut: tuple[int, int] = (2, 23),
    examples: int = 4,
    length: int = 64,
) -> dict[str, Any]:
    """Measure loading and full tuning (embeddings frozen on both sides), client and whole model.

    Returns:
        bytes of both, and ``load_ratio`` and ``tuning_ratio``, client ÷ whole.
    """
    with tempfile.TemporaryDirectory(prefix="flexp-bench-") as folder:
        size = _write_model(Path(folder), blocks, hidden, vocabulary)

        def one(where: tuple[int, int] | None) -> Measured:
            return measure(
                Probe(
                    model=folder,
                    kind="causal-lm",
                    cut=where,
                    examples=examples,
                    length=length,
                    labels=None,
                    model_config=ModelConfig(id=folder).model_dump(mode="json"),
                    optimizer=OptimizerConfig().model_dump(mode="json"),
                )
            )

        client, whole = one(cut), one(None)
    return {
        "bench": "stage-memory",
        "model": f"GPT-2, {blocks} blocks, H = {hidden}, {vocabulary} tokens, float32, random weights",
        "model_bytes": size,
        "cut": list(cut),
        "batch": [examples, length],
        "client": {"loaded": client.loaded, "peak": client.peak},
        "whole": {"loaded": whole.loaded, "peak": whole.peak},
        "load_ratio": client.loaded / whole.loaded,
        "tuning_ratio": client.peak / whole.peak,
        "machine": machine(),
    }


def _write_model(folder: Path, blocks: int, hidden: int, vocabulary: int) -> int:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=blocks,
        n_embd=hidden,
        n_head=hidden // 64,
        vocab_size=vocabulary,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with quietly():
        model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
