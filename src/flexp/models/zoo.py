"""A zoo of tiny models with random weights, one of every architecture of :mod:`flexp.models.architectures`.

``flexp verify arch:NAME`` and the tests split them: nothing is fetched, and a forward pass takes milliseconds.
Biases and norm weights are random too, where transformers begins with zeros and ones: a lost one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from flexp.errors import ModelError
from flexp.kinds import IGNORED, KINDS, ModelKind
from flexp.models.architectures import ARCHITECTURES, FIRST_TOKEN, LABELS, PAD, VOCAB, Attention, Spec
from flexp.models.batches import max_positions
from flexp.models.heads import AUTO, set_head

__all__ = ["ARCHITECTURES", "Spec", "save_tiny", "tiny_batch", "tiny_model"]

Padding = Literal["none", "left", "right"]

_NOISE = 0.1  # standard deviation, on biases and norm weights
_AUTO: dict[str, Any] = {**AUTO, "sequence-to-sequence": AutoModelForSeq2SeqLM}


def tiny_model(
    name: str,
    *,
    task: ModelKind | None = None,
    seed: int = 0,
    attention: Attention = "sdpa",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
) -> PreTrainedModel:
    """A new model of architecture ``name``, in evaluation mode, equal for equal arguments.

    Weights in another ``dtype`` are those in float32, rounded. torch's own random generator is left as it was.

    Args:
        name: a key of :data:`ARCHITECTURES`; those that FlexP refuses to split are made as well.
        task: what the model is for; the architecture's natural task when None.
        attention: a family without SDPA (Gemma 2, GPT-Neo, GPT-J, BLOOM, DeBERTa) runs eager whatever this says.
        dropout: the rate of every dropout that the configuration names.

    Raises:
        ModelError: there is no such architecture, or it cannot do the task.
    """
    spec = _spec(name)
    kind = spec.task if task is None else task
    config = _config(spec, dropout)
    known = [*spec.tasks, *(other for other in KINDS if type(config) in AUTO[other]._model_mapping)]
    if kind not in known:
        raise ModelError(f"arch:{name} has no task {kind!r}; it has: {', '.join(dict.fromkeys(known))}")
    if kind in KINDS:
        if KINDS[kind].named:
            config.num_labels = LABELS
        set_head(config, kind)
    chosen = attention if attention in spec.attentions else spec.attentions[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = _AUTO[kind].from_config(config, attn_implementation=chosen, dtype=torch.float32)
        _add_noise(model)
        if dtype != torch.float32:  # not `.to`, which would round the rotary tables as well
            weights = model.state_dict()
            model = _AUTO[kind].from_config(config, attn_implementation=chosen, dtype=dtype)
            model.load_state_dict(weights)
    return model.eval()


def tiny_batch(
    model: PreTrainedModel,
    *,
    padding: Padding = "none",
    batch: int = 3,
    length: int = 10,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A batch of random tokens or pixels that suits ``model``, its labels included.

    Tokens: ``input_ids`` (batch, length), the padding token only where there is padding. With ``padding``, rows grow
    shorter from the second on, and ``attention_mask`` (batch, length) tells how. ``labels`` are the tokens, −100 on
    padding, (batch, length) of language models; classes, (batch,), of classifiers; and what transformers' losses of
    other heads read. Images: ``pixel_values`` (batch, channels, height, width).

    Raises:
        ModelError: images are to be padded, or the batch is longer than the model's positions.
    """
    if padding not in get_args(Padding):
        raise ModelError(f"padding is {padding!r}; expected one of: {', '.join(get_args(Padding))}")
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    classes = torch.randint(0, max(2, config.num_labels), (batch,), generator=generator)
    kind = _kind_of(model)
    if model.main_input_name == "pixel_values":
        if padding != "none":
            raise ModelError("images have no padding; use padding='none'")
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        shape = (batch, vision.num_channels, *((size, size) if isinstance(size, int) else size))
        pixels = torch.randn(shape, generator=generator).to(model.dtype)
        return {"pixel_values": pixels, "labels": classes}
    text = config.get_text_config()
    positions = max_positions(config) or length
    if not 1 <= length <= positions:
        raise ModelError(f"a batch of length {length} does not fit the model: expected 1 to {positions} tokens")
    input_ids = torch.randint(FIRST_TOKEN, getattr(text, "vocab_size", VOCAB), (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    step = max(1, length // (batch + 1))
    for row in range(batch):
        short = min(row * step, length - 1)
        if short and padding == "left":
            mask[row, :short] = 0
        elif short and padding == "right":
            mask[row, -short:] = 0
    input_ids = input_ids.masked_fill(mask == 0, getattr(text, "pad_token_id", None) or PAD)
    out = {"input_ids": input_ids}
    if padding != "none":
        out["attention_mask"] = mask
    match KINDS[kind].answers:
        case "class":
            out["labels"] = classes
        case "number":
            out["labels"] = classes.to(model.dtype)
        case "classes":
            out["labels"] = torch.randint(0, 2, (batch, config.num_labels), generator=generator).to(model.dtype)
        case "tokens":
            tags = torch.randint(0, config.num_labels, (batch, length), generator=generator)
            out["labels"] = tags.masked_fill(mask == 0, IGNORED)
        case "span":
            ends = torch.randint(0, length, (2, batch), generator=generator).sort(dim=0).values
            out["start_positions"], out["end_positions"] = ends
        case _:
            out["labels"] = input_ids.masked_fill(mask == 0, IGNORED)
    return out


def _kind_of(model: PreTrainedModel) -> str:
    """What a model is for, by its class and its configuration's ``problem_type``."""
    name, problem = type(model).__name__, getattr(model.config, "problem_type", None)
    suited = [kind for kind, head in KINDS.items() if name.endswith(head.auto.removeprefix("AutoModel"))]
    if problem is None and model.config.num_labels == 1:
        problem = "regression"  # as transformers takes it
    return next((kind for kind in suited if KINDS[kind].problem == problem), suited[0] if suited else "causal-lm")


def save_tiny(name: str, folder: str | Path, *, task: ModelKind | None = None, seed: int = 0) -> Path:
    """Save a model of :func:`tiny_model` as a checkpoint in ``folder`` (made if need be), and return that path."""
    path = Path(folder)
    tiny_model(name, task=task, seed=seed).save_pretrained(path)
    return path


def _spec(name: str) -> Spec:
    spec = ARCHITECTURES.get(name)
    if spec is None:
        raise ModelError(f"there is no architecture {name!r}; expected one of: {', '.join(ARCHITECTURES)}")
    return spec


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set every dropout that ``config`` names to ``rate``; other noise of training (dropped blocks, jitter) to zero."""
    config.classifier_dropout = rate  # which some heads make up where it is not named
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in vars(part).items():
            if key == "layerdrop" or (key.endswith("jitter_noise") and isinstance(value, float)):
                setattr(part, key, 0.0)
            elif "drop" in key and isinstance(value, int | float | None) and not isinstance(value, bool):
                # None among them: it stands for another dropout's rate. Some fields are declared as whole numbers.
                setattr(part, key, int(rate) if isinstance(value, int) and rate == int(rate) else rate)


def _config(spec: Spec, dropout: float) -> PreTrainedConfig:
    config = AutoConfig.for_model(spec.model_type, **spec.options)
    set_dropout(config, dropout)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def _add_noise(model: nn.Module) -> None:
    """Disturb biases and norm weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(_NOISE * torch.randn_like(parameter))
