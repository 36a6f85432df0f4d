"""SmolLM2-135M-Instruct (arXiv 2502.02737) from a 4-bit GGUF file to a bfloat16 Hugging Face folder.

The weights carry the rounding of Q4_1: this is not bit for bit the published model, but close enough to
fine-tune.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_POSITIONS = 8192  # of the published model; GGUF tokenizers do not say


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Unpack the GGUF file below ``source`` to weights, configuration and tokenizer in the folder ``target``.

    Needs the module ``gguf`` and about 1.3 GB of memory.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return _convert(next(source.rglob("*.gguf")), target)
    finally:
        if bars:
            logging.enable_progress_bar()


def _convert(gguf: Path, target: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = _POSITIONS
    tokenizer.save_pretrained(target)

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    known = model.config.to_dict()
    # The loader leaves a note that the weights are quantised; whoever loads the result must not find it.
    for key in ("quantization_config", "_name_or_path", "transformers_version", "dtype", "unk_token_id"):
        known.pop(key, None)
    config = LlamaConfig(**known)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)
    return {
        "architecture": "llama",
        "blocks": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "dtype": "bfloat16",
        "weights": "dequantised from Q4_1",
    }
