"""A short name for "the same model", which parties that hold different parts of it can compare."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_IGNORED = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "id2label", "label2id",
    "num_labels", "problem_type", "use_cache", "_attn_implementation", "attn_implementation", "return_dict",
    "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip


def fingerprint(config: Any) -> str:
    """A hash of all that a model's configuration says of its blocks: 16 hexadecimal digits."""
    facts = {key: value for key, value in config.to_dict().items() if key not in _IGNORED}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
