"""A zoo of tiny models with random weights, one of every architecture that FlexP is held to.

``flexp verify arch:NAME`` and the tests split them: nothing is fetched, and a forward pass takes milliseconds. What
tells layers apart in the large models (sliding windows, local attention, dense layers among experts) is kept and made
shorter than the batches of :func:`tiny_batch`, so that a layer run under the wrong index gives another result. Biases
and norm weights are random too, where the initialisation of transformers leaves zeros and ones: a lost one shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from flexp.errors import ModelError

TaskKind = Literal["causal-lm", "sequence-classification", "image-classification"]
Attention = Literal["sdpa", "eager"]
Padding = Literal["none", "left", "right"]

HIDDEN = 32
HEADS = 4
BLOCKS = 4
VOCAB = 97
POSITIONS = 64
WINDOW = 4  # of sliding and local attention: shorter than the default batch
LABELS = 3
PAD, BOS, EOS, FIRST_TOKEN = 0, 2, 3, 5

_IGNORED = -100  # what transformers' losses leave out
_SPREAD = 0.1  # standard deviation of initial weights: signals large enough for mistakes to show
_AUTO: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
    "sequence-to-sequence": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Spec:
    """How to make a tiny model of one architecture.

    ``attentions`` holds what the family implements, the preferred one first; a ``reason`` says why FlexP refuses
    to split it.
    """

    model_type: str
    tasks: tuple[str, ...]  # the natural one first
    options: Mapping[str, Any] = field(default_factory=dict)  # of the configuration
    attentions: tuple[Attention, ...] = ("sdpa", "eager")
    refused: bool = False
    reason: str = ""

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
    "phi3": _decoder(
        "phi3", _DECODER | {"num_key_value_heads": 2, "original_max_position_embeddings": POSITIONS}
    ),
    "opt": _decoder("opt", _OPT),
    # as OPT-350m: norms after the sublayers, no final norm, embeddings narrower than the blocks
    "opt-projected": _decoder("opt", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": _decoder(
        "gpt_neox", _DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
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
    "falcon-alibi": _decoder(
        "falcon", _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}
    ),
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
        refused=True,
        reason="encoder and decoder: two stacks of blocks, which share a table of relative positions",
    ),
    "deberta_v2": _encoder(
        "deberta-v2",
        _DECODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
        attentions=_EAGER,
        refused=True,
        reason="all blocks share one trainable table of relative positions",
    ),
    "albert": _encoder(
        "albert",
        _DECODER | {"embedding_size": 16, "inner_group_num": 1},
        refused=True,
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
        refused=True,
        reason="every block takes an embedding of the tokens of its own",
    ),
    "gemma4": Spec(
        "gemma4_text",
        ("causal-lm",),
        _GROUPED
        | _GEMMA_LAYERS
        | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
        refused=True,
        reason="every block takes an embedding of the tokens of its own",
    ),
}
"""Every architecture by name; see :class:`Spec`. Weights are tied where the family ties them by default."""


def tiny_model(
    name: str,
    *,
    task: TaskKind | None = None,
    seed: int = 0,
    attention: Attention = "sdpa",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> PreTrainedModel:
    """A new model of architecture ``name``, in evaluation mode, equal for equal arguments.

    ``task`` is the natural one when None. A family that knows no SDPA (Gemma 2, GPT-Neo, GPT-J, BLOOM) runs eager
    whatever ``attention`` says. ``dropout`` goes to every dropout that the configuration names. The state of torch's
    own random generator is left as it was.

    Raises :class:`ModelError` for a name that is not in :data:`ARCHITECTURES`, or a task that it cannot do.
    """
    spec = _spec(name)
    kind = spec.task if task is None else task
    if kind not in spec.tasks:
        raise ModelError(f"arch:{name} has no task {kind!r}; it has: {', '.join(spec.tasks)}")
    config = _config(spec, dropout)
    if kind.endswith("classification"):
        config.num_labels = LABELS
    chosen = attention if attention in spec.attentions else spec.attentions[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _AUTO[kind].from_config(config, attn_implementation=chosen, dtype=dtype)
        _randomise_vectors(model)
    return model.eval()


def tiny_batch(
    model: PreTrainedModel,
    *,
    padding: Padding = "none",
    batch: int = 3,
    length: int = 10,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A batch that suits ``model``, a model of :func:`tiny_model`, its labels included.

    Tokens: ``input_ids`` (batch, length), never the padding token but for padding; with ``padding``, rows grow
    shorter from the second on, and ``attention_mask`` (batch, length) tells where. ``labels`` are the tokens, −100 on
    padding (language models), or (batch,) classes. Images: ``pixel_values`` (batch, channels, height, width).

    Raises :class:`ModelError` where images are to be padded, or the batch is longer than the model's positions.
    """
    if padding not in get_args(Padding):
        raise ModelError(f"padding is {padding!r}; expected one of: {', '.join(get_args(Padding))}")
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, LABELS, (batch,), generator=generator)
    config = model.config
    if model.main_input_name == "pixel_values":
        if padding != "none":
            raise ModelError("images have no padding; use padding='none'")
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(shape, generator=generator).to(model.dtype)
        return {"pixel_values": pixels, "labels": classes}
    if not 1 <= length <= POSITIONS:
        raise ModelError(
            f"a batch of length {length} does not fit a tiny model: expected 1 to {POSITIONS} tokens"
        )
    input_ids = torch.randint(FIRST_TOKEN, VOCAB, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    step = max(1, length // (batch + 1))
    for row in range(batch):
        short = min(row * step, length - 1)
        if short and padding == "left":
            mask[row, :short] = 0
        elif short and padding == "right":
            mask[row, -short:] = 0
    input_ids = input_ids.masked_fill(mask == 0, config.pad_token_id)
    out = {"input_ids": input_ids}
    if padding != "none":
        out["attention_mask"] = mask
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    out["labels"] = classes if classifies else input_ids.masked_fill(mask == 0, _IGNORED)
    return out


def save_tiny(name: str, folder: str | Path, *, task: TaskKind | None = None, seed: int = 0) -> Path:
    """Save a model of :func:`tiny_model` as a checkpoint in ``folder`` (made if need be), and return that path."""
    path = Path(folder)
    tiny_model(name, task=task, seed=seed).save_pretrained(path)
    return path


def _spec(name: str) -> Spec:
    spec = ARCHITECTURES.get(name)
    if spec is None:
        raise ModelError(f"there is no architecture {name!r}; expected one of: {', '.join(ARCHITECTURES)}")
    return spec


def _config(spec: Spec, dropout: float) -> PreTrainedConfig:
    config = AutoConfig.for_model(spec.model_type, **spec.options)
    for key, value in vars(config).items():
        if ("dropout" in key or key.endswith("pdrop")) and not isinstance(value, bool | str):
            setattr(config, key, dropout)  # None among them: it stands for another dropout's rate
        elif key == "layerdrop":
            setattr(config, key, 0.0)  # drops whole blocks, which no split can follow
        elif key == "use_cache":
            config.use_cache = False
    return config


def _randomise_vectors(model: PreTrainedModel) -> None:
    """Add noise to biases and norm weights, drawn in float32 so that every dtype gets the same model."""
    with torch.no_grad():
        for parameter in cast(torch.nn.Module, model).parameters():
            if parameter.dim() == 1:
                parameter.add_((_SPREAD * torch.randn(parameter.shape)).to(parameter.dtype))
