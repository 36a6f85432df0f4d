"""How fast a split model writes, beside the same model in one piece.

Both write the same answer (greedy, token for token) in turn, in one process: the whole model, the split one over gRPC
on this machine's loopback, and once more behind a network that takes its time. Each token is one round trip, so on a
slow network a token takes at least that long, whatever the model. Predicted for loopback at H = 512: 0.8–0.9, since a
round trip costs one to two milliseconds and the masks are made twice.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig

from benchmarks.tools.command import Dtype, Result, Threads, fetched
from benchmarks.tools.paired import paired
from benchmarks.tools.parties import blocks_of, cut_of, parties, random_model
from flexp.client.generation import SplitGenerator
from flexp.links.emulated import EmulatedLink, Network
from flexp.links.opening import connected, loopback


def measure(
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
    dtype: Dtype = "float32",
    threads: Threads = 1,
) -> Result:
    """Tokens a second of a split model ÷ those of the whole one; and on a slow network.

    The ratio of processor time, which other processes do not disturb as much, leaves out what waking threads takes.
    """
    with ExitStack() as stack:
        name = model or stack.enter_context(random_model("causal-lm", _llama(hidden, blocks, vocabulary)))
        folder = fetched(name, threads)
        where = cut_of(cut, blocks_of(folder), (1, blocks_of(folder) - 1))
        here = parties(
            folder, "causal-lm", f"{where[0]}:{where[1]}", examples=1, length=prompt, tuning="frozen", dtype=dtype
        )
    source, server = here.source.model.eval(), here.server()
    ids = torch.randint(5, source.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    cpu = {"whole": 0.0, "split": 0.0}
    with loopback(server, "bench") as link:
        split = here.client(link)
        writer = SplitGenerator(split)
        ways = {
            "whole": lambda: source.generate(ids, use_cache=True, **options),
            "split": lambda: writer.generate(ids, **options),
        }
        same = torch.equal(ways["whole"](), ways["split"]())

        def write(way: str) -> None:
            began = time.process_time()
            ways[way]()
            cpu[way] += time.process_time() - began

        # seconds of split ÷ whole; the speeds' ratio is its inverse
        timed = paired(lambda: write("whole"), lambda: write("split"), pairs)
    far = EmulatedLink(server.connect("far away"), Network(latency_s=round_trip / 2e3))
    with connected(far):
        split.rejoin(far)
        began = time.perf_counter()
        ways["split"]()
        slow = time.perf_counter() - began
        sent = far.meter.evaluation.bytes_up + far.meter.evaluation.bytes_down
    facts: dict[str, Any] = {
        "model": model or f"random Llama, {blocks} blocks, vocabulary {vocabulary}",
        "hidden": here.source.anatomy.hidden, "cut": list(where), "dtype": dtype, "prompt": prompt, "tokens": tokens,
        "pairs": pairs, "same_tokens": same, "rebuilt": writer.rebuilt, "ratio": 1 / timed.ratio,
        "ratio_quartiles": [1 / timed.quartiles[1], 1 / timed.quartiles[0]], "cpu_ratio": cpu["whole"] / cpu["split"],
        "whole_tokens_per_second": tokens / timed.first, "split_tokens_per_second": tokens / timed.second,
        "round_trip_seconds": round_trip / 1e3, "slow_tokens_per_second": tokens / slow, "bytes": sent,
    }  # fmt: skip
    low, high = facts["ratio_quartiles"]
    rows = [
        ("split ÷ whole, tokens a second (median of pairs)", f"{facts['ratio']:.3f}"),
        ("quartiles", f"{low:.3f} – {high:.3f}"),
        ("processor time, whole ÷ split", f"{facts['cpu_ratio']:.3f}"),
        ("whole model", f"{tokens / timed.first:.1f} tokens a second"),
        ("split, loopback", f"{tokens / timed.second:.1f} tokens a second"),
        (f"split, round trip {round_trip:g} ms", f"{tokens / slow:.1f} tokens a second"),
        ("the same tokens", "yes" if same else "NO"),
    ]
    return Result(facts, rows)


def _llama(hidden: int, blocks: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), vocab_size=vocabulary,
        max_position_embeddings=2048,
    )  # fmt: skip
