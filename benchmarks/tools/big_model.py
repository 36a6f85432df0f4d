"""Checkpoints with random weights of real models' shapes, written shard by shard; and a server of one, in a process of
its own, whose memory the kernel tells."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from flexp.config import AlignConfig, ModelConfig, OptimizerConfig, ServerConfig
from flexp.cost.echo import reset_peak, resident, warm_up
from flexp.errors import FlexpError
from flexp.files import write_json
from flexp.links.base import ask
from flexp.links.messages import BackwardRequest, ForwardRequest, Join
from flexp.models.fingerprint import fingerprint
from flexp.server import Server

SHARD = 1 << 30
"""Bytes of a shard, at most, but for a tensor that is larger."""

LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "num_attention_heads": 32}
SHAPES: dict[str, Any] = {
    "llama-3.2-1b": lambda: transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True, **LLAMA
    ),
    "llama-3.1-8b": lambda: transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, tie_word_embeddings=False, **LLAMA
    ),
    "qwen3-4b": lambda: transformers.Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "small": lambda: transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip
"""From the models' published ``config.json``; ``small`` is for tests."""


SIZES = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
         "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
"""What makes a checkpoint another one, in its ``config.json``."""


def write_random(shape: str, folder: Path, blocks: int | None = None) -> Path:
    """A checkpoint in bfloat16 of one of :data:`SHAPES`, of which no process ever holds more than a shard; of its first
    ``blocks`` alone, where that is said."""
    config = SHAPES[shape]()
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    config.pad_token_id = 0
    if (folder / "model.safetensors.index.json").is_file():
        told, wanted = json.loads((folder / "config.json").read_text()), json.loads(config.to_json_string())
        odd = [key for key in SIZES if told.get(key) != wanted.get(key)]
        if odd:
            raise FlexpError(
                f"{folder} holds a checkpoint of another shape: its {odd[0]} is {told.get(odd[0])}, {shape}"
                f"{'' if blocks is None else f' with {blocks} blocks'} has {wanted.get(odd[0])}; name another folder"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    generator, placed, shard, size = torch.Generator().manual_seed(0), dict[str, str](), dict[str, torch.Tensor](), 0

    def flush() -> None:
        file = f"model-{len(set(placed.values())):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, dims in names.items():
        if shard and size + 2 * math.prod(dims) > SHARD:
            flush()
            size = 0
        drawn = torch.ones(dims) if len(dims) == 1 else torch.randn(dims, generator=generator).mul_(0.02)
        shard[name] = drawn.to(torch.bfloat16)
        size += 2 * math.prod(dims)
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": placed})
    return folder


def server_memory(config: ModelConfig, cut: tuple[int, int], examples: int, length: int) -> dict[str, float]:
    """Bytes above the interpreter's own of a server with blocks [s, e): at the highest while loading (``loaded``), and
    in two exchanges with one client (``peak``); and the ``seconds`` of the second one's two requests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    given = json.dumps([config.model_dump(mode="json"), cut, examples, length])
    command = [sys.executable, "-m", "benchmarks.tools.big_model", given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _serve(config: ModelConfig, cut: tuple[int, int], examples: int, length: int) -> dict[str, float]:
    import time

    torch.set_num_threads(1)
    warm_up()
    before = resident("VmRSS")
    reset_peak()
    server = Server.from_pretrained(
        config, "causal-lm", base_depth=cut[0], end=cut[1], config=ServerConfig(), optimizer=OptimizerConfig()
    )
    stage = server.shared.stage
    for value in stage.model.parameters():  # mapped from a file: read once, so that they count
        value.detach().amax()
    loaded = resident("VmHWM") - before
    link = server.connect("bench")
    join = Join(
        "bench", fingerprint(stage.model.config), cut, str(stage.model.dtype), "lora", AlignConfig(kind="off"),
        lora=config.lora,
        weights=stage.weights, quantization=config.quantization,
    )  # fmt: skip
    ask(link, join)
    shape = (examples, length, stage.anatomy.hidden)
    began = 0.0
    for number in (1, 2):
        began = time.perf_counter()
        h = ask(link, ForwardRequest(number, torch.randn(shape, dtype=stage.model.dtype), step=number, train=True))
        ask(link, BackwardRequest(number, torch.randn_like(h.hidden_BTH) * 1e-4, step=number))
    seconds = time.perf_counter() - began
    return {"loaded": loaded, "peak": resident("VmHWM") - before, "seconds": seconds}


if __name__ == "__main__":
    _config, _cut, _examples, _length = json.loads(sys.argv[1])
    print(json.dumps(_serve(ModelConfig(**_config), (_cut[0], _cut[1]), _examples, _length)))
