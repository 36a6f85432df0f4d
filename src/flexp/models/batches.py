"""What a batch may bring to a model whose blocks are in several places: looked at before every forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor

from flexp.errors import ModelError
from flexp.kinds import LABELS

NOT_FOR_BLOCKS = frozenset({*LABELS, "shift_labels", "num_items_in_batch"})
"""What a batch may hold that only the loss needs."""
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""Where packed rows begin, for flash attention and state spaces; others take it from the positions, as servers do."""
NEED_ALL_BLOCKS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What may be asked of a whole model, but not of one whose blocks are in several places."""
USUAL = frozenset({"input_ids", "inputs_embeds", "pixel_values", "attention_mask", "token_type_ids", "position_ids"})
"""What most models read; of the rest of a batch a server knows nothing."""


def for_blocks(model: Any, inputs: Mapping[str, Any], longest: int | None) -> dict[str, Any]:
    """What of a batch the model reads before its head.

    Args:
        longest: of :func:`longest_exact`.

    Raises:
        ModelError: it asks for what only a whole model can give, or its mask is not one row of tokens an example.
    """
    for key in NEED_ALL_BLOCKS:
        if inputs.get(key):
            raise ModelError(f"{key}=True was asked for, but a split model has its blocks in several places")
    unread = NOT_FOR_BLOCKS | (PACKED if only_masks(model) else frozenset())
    wanted = {key: value for key, value in inputs.items() if key not in unread}
    mask, places = wanted.get("attention_mask"), wanted.get("cache_position")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ModelError(
            f"attention_mask has {what}, and a server makes its own masks from one number a token, (B, T); give it that"
        )
    given = next((wanted[key] for key in ("input_ids", "inputs_embeds") if key in wanted), None)
    if given is not None:
        length = given.shape[1]
        if places is not None and torch.equal(places, torch.arange(length, device=places.device)):
            del wanted["cache_position"]  # what every model counts by itself
        check_length(model, length, wanted.get("position_ids"), longest)
    return wanted


def only_masks(model: Any) -> bool:
    """Whether the blocks know of packed rows by their attention masks alone."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    attention = all(str(kind).endswith("attention") and "linear" not in str(kind) for kind in kinds)
    masked = getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
    return masked and attention and not getattr(model, "_is_stateful", False)


def check_length(model: Any, length: int, positions: Tensor | None, longest: int | None) -> None:
    """Refuse tokens for which this model's rotary table would depend on what other batches it has seen.

    Args:
        length: of the whole text in tokens, those of an earlier forward included.
        longest: of :func:`longest_exact`.

    Raises:
        ModelError: they are more.
    """
    if longest is None:
        return
    last = length if positions is None else max(length, int(positions.max()) + 1)
    if last > longest:
        raise ModelError(
            f"{type(model).__name__}: {last} tokens are more than the {longest} that its rotary table was made for. "
            "Beyond them it grows with the longest text so far (dynamic NTK), which a server with several clients "
            "cannot follow: shorten texts (data.max_length), or set another rope_type in config.json (yarn, linear)"
        )


def longest_exact(config: Any) -> int | None:
    """The tokens up to which the model's answer to a text depends on that text alone; ``None``: always.

    transformers' ``dynamic`` rotary tables remember the longest text since the last short one.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    grows = any("dynamic" in str(table.get("rope_type", "")) for table in tables)
    return int(text.max_position_embeddings) if grows else None


def max_positions(config: Any) -> int | None:
    """The longest input of a model in tokens, if it has one."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    pad = getattr(text, "pad_token_id", None)
    # RoBERTa and its kin count positions from behind their padding token's id on.
    return int(positions) - (pad + 1 if pad is not None and _counts_from_padding(text.__class__) else 0)


@lru_cache(maxsize=64)
def _counts_from_padding(config: Any) -> bool:
    mapping: Any = transformers.AutoModel._model_mapping
    if config not in mapping:
        return False
    found = mapping[config]
    module = inspect.getmodule(found[0] if isinstance(found, tuple) else found)
    parts = [module, *(part for part in vars(module).values() if inspect.isclass(part))]
    return any(hasattr(part, "create_position_ids_from_input_ids") for part in parts)


@lru_cache(maxsize=64)
def pools_at_padding(cls: Any) -> bool:
    """Whether a classifier finds where a text ends by the padding token's id, as decoders do, and not by the mask."""
    return "pad_token_id" in inspect.getsource(cls.forward)


def align_padding(model: Any, pad: int | None) -> None:
    """Let a classifier that looks for padding look for the tokenizer's, which batches are filled up with."""
    if pad is not None and pools_at_padding(model.__class__):
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = pad


def check_padding(model: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse a batch in which a classifier would take padding for the end of a text.

    Its answer would depend on how long the other rows are.

    Raises:
        ModelError: see above.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or not pools_at_padding(model.__class__):
        return
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    mend = "set model.config.pad_token_id = tokenizer.pad_token_id"
    if pad is None and len(ids) > 1:
        raise ModelError(f"{type(model).__name__} knows no padding token, so it cannot tell where texts end: {mend}")
    if mask is None:
        return
    places = torch.arange(ids.shape[1], device=ids.device)
    ends = torch.ones_like(ids) if pad is None else (ids != pad).long()
    if bool(((places * ends).argmax(-1) > (places * mask.long()).argmax(-1)).any()):
        raise ModelError(
            f"{type(model).__name__} looks for the padding token {pad}, but this batch is padded with another, which "
            f"it would take for text: {mend}"
        )
