"""``python -m benchmarks inference``: how fast a split model writes, beside the same model in one piece.

Both write the same answer (greedy, token for token) in turn, in one process: the whole model, the split one over gRPC
on this machine's loopback, and once more behind a network that takes its time. Each token is one round trip, so on a
slow network a token takes at least that long, whatever the model. Predicted for loopback at H = 512: 0.8–0.9, since a
round trip costs one to two milliseconds and the masks are made twice.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.paired import paired
from flexp.client.generation import SplitGenerator
from flexp.client.model import SplitModelForCausalLM
from flexp.config import ModelConfig
from flexp.links.emulated import EmulatedLink, Network
from flexp.links.opening import connected, loopback
from flexp.machine import machine
from flexp.models.loading import load_stage
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage, carve
from flexp.models.tuning import tune
from flexp.server import Server


def inference(
    model: str | None = None,
    *,
    hidden: int = 512,
    blocks: int = 8,
    vocabulary: int = 8192,
    cut: tuple[int, int | None] | None = None,
    prompt: int = 32,
    tokens: int = 64,
    pairs: int = 8,
    round_trip: float = 0.05,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Time ``pairs`` of answers, and one on the slow network.

    Args:
        model: ``None`` makes a Llama of random weights with ``blocks`` blocks of width ``hidden``.
        round_trip: seconds of the slow network, there and back.

    Returns:
        ``ratio``: the median of split ÷ whole tokens a second over the pairs, with its quartiles; ``cpu_ratio``: whole
        ÷ split seconds of processor time, which other processes do not disturb as much, and which leaves out what
        waking threads takes; and the tokens a second of all three.
    """
    source = (
        _random(hidden, blocks, vocabulary)
        if model is None
        else load_stage(ModelConfig.of(model, dtype=dtype), "causal-lm")
    )
    total = source.anatomy.blocks
    where = check_cut(cut or (1, total - 1), total)
    tune(source, ModelConfig(id="any"), "frozen")
    stage = carve(source, Part.server(*where))
    server = Server(stage, tuning="frozen")
    ids = torch.randint(5, source.model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    with loopback(server, "bench") as link:
        client = carve(source, Part.client(where, total))
        split = SplitModelForCausalLM(client, where, link, tuning="frozen", expose_embeddings=True)
        writer = SplitGenerator(split)
        source.model.eval()
        same = torch.equal(source.model.generate(ids, use_cache=True, **options), writer.generate(ids, **options))
        cpu = {"whole": 0.0, "split": 0.0}

        def write(which: str) -> None:
            began = time.process_time()
            if which == "whole":
                source.model.generate(ids, use_cache=True, **options)
            else:
                writer.generate(ids, **options)
            cpu[which] += time.process_time() - began

        # seconds of split ÷ whole; the speeds' ratio is its inverse
        timed = paired(lambda: write("whole"), lambda: write("split"), pairs)
    far = EmulatedLink(server.connect("far away"), Network(latency_s=round_trip / 2))
    with connected(far):
        split.rejoin(far)
        began = time.perf_counter()
        writer.generate(ids, **options)
        slow = time.perf_counter() - began
        sent = far.meter.evaluation.bytes_up + far.meter.evaluation.bytes_down
    return {
        "bench": "inference",
        "model": model or f"random Llama, {blocks} blocks, vocabulary {vocabulary}",
        "hidden": source.anatomy.hidden,
        "cut": list(where),
        "dtype": dtype,
        "prompt": prompt,
        "tokens": tokens,
        "pairs": pairs,
        "same_tokens": same,
        "rebuilt": writer.rebuilt,
        "ratio": 1 / timed.ratio,
        "ratio_quartiles": [1 / timed.quartiles[1], 1 / timed.quartiles[0]],
        "cpu_ratio": cpu["whole"] / cpu["split"],
        "whole_tokens_per_second": tokens / timed.first,
        "split_tokens_per_second": tokens / timed.second,
        "round_trip_seconds": round_trip,
        "slow_tokens_per_second": tokens / slow,
        "bytes": sent,
        "machine": machine(),
    }


def _random(hidden: int, blocks: int, vocabulary: int) -> Stage:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stage.whole(LlamaForCausalLM(config).requires_grad_(False))
