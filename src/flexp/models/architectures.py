"""The architectures that FlexP is held to, as tiny configurations: :mod:`flexp.models.zoo` makes models of them.

What tells the blocks of the large models apart (sliding windows, local attention, dense blocks among experts) is kept,
and windows are shorter than the batches of the zoo, so that a block run under a wrong index gives another result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Attention = Literal["sdpa", "eager"]

HIDDEN = 32
HEADS = 4
BLOCKS = 4
VOCAB = 97
POSITIONS = 64
WINDOW = 4  # of sliding and local attention: shorter than the default batch
LABELS = 3
PAD, BOS, EOS, FIRST_TOKEN = 0, 2, 3, 5

_SPREAD = 0.1  # standard deviation of initial weights: signals large enough for mistakes to show


@dataclass(frozen=True)
class Spec:
    """How to make a tiny model of one architecture.

    ``attentions`` holds what the family implements, the preferred one first. ``reason`` says why FlexP refuses to
    split the architecture, and is empty where it does not.
    """

    model_type: str
    tasks: tuple[str, ...]  # the natural one first
    options: Mapping[str, Any] = field(default_factory=dict)  # of the configuration
    attentions: tuple[Attention, ...] = ("sdpa", "eager")
    reason: str = ""

    @property
    def refused(self) -> bool:
        """Whether FlexP refuses to split it."""
        return bool(self.reason)

    @property
    def task(self) -> str:
        """What the architecture is usually trained for."""
        return self.tasks[0]


_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_DECODER: dict[str, Any] = _COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": _SPREAD,
}
_GROUPED: dict[str, Any] = _DECODER | {"num_key_value_heads": HEADS // 2, "head_dim": HIDDEN // HEADS}
_GPT2: dict[str, Any] = _COMMON | {
    "n_embd": HIDDEN,
    "n_layer": BLOCKS,
    "n_head": HEADS,
    "n_positions": POSITIONS,
    "initializer_range": _SPREAD,
}
_GEMMA_LAYERS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * (BLOCKS // 2),
    "sliding_window": WINDOW,
}
_OPT: dict[str, Any] = _COMMON | {
    "hidden_size": HIDDEN,
    "ffn_dim": 2 * HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": HIDDEN,
    "pad_token_id": 1,
    "init_std": _SPREAD,
}
_FALCON: dict[str, Any] = {k: v for k, v in _DECODER.items() if k != "intermediate_size"} | {"bias": True}
_IMAGE: dict[str, Any] = {k: v for k, v in _DECODER.items() if k not in (*_COMMON, "max_position_embeddings")}


def _decoder(model_type: str, options: dict[str, Any], **more: Any) -> Spec:
    return Spec(model_type, ("causal-lm", "sequence-classification"), options, **more)


def _encoder(model_type: str, options: dict[str, Any], **more: Any) -> Spec:
    return Spec(model_type, ("sequence-classification",), options, **more)


_EAGER: tuple[Attention, ...] = ("eager",)

ARCHITECTURES: dict[str, Spec] = {
    "gpt2": _decoder("gpt2", _GPT2),
    "gpt2-untied": _decoder("gpt2", _GPT2 | {"tie_word_embeddings": False}),
    "llama": _decoder("llama", _GROUPED),
    "llama-tied": _decoder("llama", _GROUPED | {"tie_word_embeddings": True}),
    "mistral": _decoder("mistral", _GROUPED | {"sliding_window": WINDOW}),
    "qwen2": _decoder(
        "qwen2",
        _DECODER
        | {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,  # layers below attend to everything
        },
    ),
    "qwen3": _decoder("qwen3", _GROUPED),
    "qwen3_moe": _decoder(
        "qwen3_moe",
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": HIDDEN // 2,
            "mlp_only_layers": [1],
        },
    ),
    "gemma": _decoder("gemma", _GROUPED),
    "gemma2": _decoder("gemma2", _GROUPED | _GEMMA_LAYERS | {"query_pre_attn_scalar": 8}, attentions=_EAGER),
    "gemma3": _decoder("gemma3_text", _GROUPED | _GEMMA_LAYERS | {"query_pre_attn_scalar": 8}),
    "phi3": _decoder("phi3", _DECODER | {"num_key_value_heads": 2, "original_max_position_embeddings": POSITIONS}),
    "opt": _decoder("opt", _OPT),
    # as OPT-350m: norms after the sublayers, no final norm, embeddings narrower than the blocks
    "opt-projected": _decoder("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": _decoder("gpt_neox", _DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "gpt_neo": _decoder(
        "gpt_neo",
        _COMMON
        | {
            "hidden_size": HIDDEN,
            "num_layers": BLOCKS,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], BLOCKS // 2]],
            "window_size": WINDOW,
            "max_position_embeddings": POSITIONS,
            "initializer_range": _SPREAD,
        },
        attentions=_EAGER,
    ),
    "gptj": _decoder("gptj", _GPT2 | {"rotary_dim": 4}, attentions=_EAGER),
    "bloom": _decoder(
        "bloom",
        _COMMON | {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": HEADS, "initializer_range": _SPREAD},
        attentions=_EAGER,
    ),
    "falcon": _decoder("falcon", _FALCON | {"multi_query": True}),
    "falcon-new": _decoder("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": _decoder("falcon", _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "bert": _encoder("bert", _DECODER),
    "roberta": _encoder("roberta", _DECODER | {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}),
    "distilbert": _encoder(
        "distilbert",
        _COMMON
        | {
            "dim": HIDDEN,
            "hidden_dim": 2 * HIDDEN,
            "n_layers": BLOCKS,
            "n_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "initializer_range": _SPREAD,
        },
    ),
    "modernbert": _encoder(
        "modernbert",
        _DECODER
        | {
            "num_hidden_layers": 5,  # full, sliding, sliding, full, sliding
            "local_attention": WINDOW,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
        },
    ),
    "vit": Spec("vit", ("image-classification",), _IMAGE | {"image_size": 12, "patch_size": 4}),
    "t5": Spec(
        "t5",
        ("sequence-to-sequence",),
        _COMMON
        | {
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": 2 * HIDDEN,
            "num_layers": BLOCKS,
            "num_heads": HEADS,
            "decoder_start_token_id": PAD,
        },
        reason="encoder and decoder: two stacks of blocks, which share a table of relative positions",
    ),
    "deberta_v2": _encoder(
        "deberta-v2",
        _DECODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        attentions=_EAGER,
        reason="all blocks share one trainable table of relative positions",
    ),
    "albert": _encoder(
        "albert",
        _DECODER | {"embedding_size": 16, "inner_group_num": 1},
        reason="one block is applied again and again: its weights cannot belong to two parties",
    ),
    "gemma3n": Spec(
        "gemma3n_text",
        ("causal-lm",),
        _GROUPED
        | _GEMMA_LAYERS
        | {
            "intermediate_size": [2 * HIDDEN] * BLOCKS,
            "activation_sparsity_pattern": [0.0] * BLOCKS,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
        },
        reason="every block takes an embedding of the tokens of its own",
    ),
    "gemma4": Spec(
        "gemma4_text",
        ("causal-lm",),
        _GROUPED
        | _GEMMA_LAYERS
        | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
        reason="every block takes an embedding of the tokens of its own",
    ),
}
"""Every architecture by name; see :class:`Spec`. Weights are tied where the family ties them by default."""
