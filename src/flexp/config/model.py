"""The table ``[model]``: the pretrained model and how it is tuned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticKnownError

from flexp.config.section import Fraction, PositiveInt, Section

Tuning = Literal["full", "lora"]
Quantization = Literal["off", "int8", "nf4"]
DEVICES = "'auto', 'cpu', 'mps', or 'cuda' or 'xpu', which may have a number as in 'cuda:1'"


def _known(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise PydanticKnownError("literal_error", {"expected": DEVICES})
    return name


Device = Annotated[str, AfterValidator(_known)]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al., 2021, arXiv 2106.09685), used when ``model.tuning`` is ``lora``."""

    rank: PositiveInt = 8
    alpha: float = 16.0
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"  # names of linear modules inside the blocks, as peft takes them


class ComputeConfig(Section):
    """How a model is computed and tuned, as a run's ``[model]`` and a fleet's ``[task]`` say it alike."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is for LoRA: full tuning in it loses small steps
    # mixed precision: weights, optimiser and what crosses stay in dtype, matrix products are computed in bfloat16
    autocast: Literal["off", "bfloat16"] = "off"
    # an architecture without SDPA (Gemma 2, GPT-Neo, GPT-J, BLOOM) runs eager whatever this says
    attention: Literal["sdpa", "eager"] = "sdpa"
    # linear layers of the blocks in 8 or 4 bits, as they are loaded (bitsandbytes); what is trained are adapters
    quantization: Quantization = "off"
    # likewise the token embeddings and a language model's head of whoever has the ends
    quantize_ends: bool = False
    tuning: Tuning = "full"
    train_embeddings: bool = False  # with full tuning: also the client's embeddings (and a head tied to them)
    # of tokens, frozen and not tied to the head; file: they stay in the checkpoint's file, which each batch reads the
    # rows of its tokens from: equal numbers, less memory
    embeddings: Literal["memory", "file"] = "memory"
    # of whoever has the ends, with LoRA; file: what is frozen of a block is read from the checkpoint's file when the
    # block runs, forward or backward, and is in memory no longer: equal numbers, less memory (Linux)
    blocks: Literal["memory", "file"] = "memory"

    @property
    def computed(self) -> dict[str, Any]:
        """These keys alone."""
        return {name: getattr(self, name) for name in ComputeConfig.model_fields}


class ModelConfig(ComputeConfig):
    """The pretrained model and how it is tuned."""

    # folder (beside the TOML file, or as given), Hugging Face id, asset:NAME, or arch:NAME (tiny, random weights)
    id: str
    # auto: a GPU if there is one; cuda:1: the second GPU (ROCm's, too); also xpu and mps
    device: Device = "cpu"
    lora: LoraConfig = LoraConfig()
    # what a text classifier's head reads: the checkpoint's own head, or one linear layer on the mean of the tokens'
    # last hidden states, on the last token's or on the first's
    pooling: Literal["checkpoint", "mean", "last", "cls"] = "checkpoint"
    # how a classifier begins: as drawn (or as in the checkpoint), or in closed form from all clients' class sums
    head: Literal["random", "closed-form"] = "random"
    gradient_checkpointing: bool = False  # on the client's own blocks
    base_depth: Annotated[int, Field(ge=0)] | None = None  # s_min; None: the smallest s of the clients
    expose_embeddings: bool = False  # allow s = 0, where the server can read every token from what it receives

    @classmethod
    def of(cls, model: ModelConfig | str | Path, **settings: Any) -> ModelConfig:
        """``model``, or the one of that name, with these settings.

        Raises:
            ConfigError: there is no such setting, or it cannot have that value.
        """
        if isinstance(model, ModelConfig) and not settings:
            return model
        given = model.model_dump() if isinstance(model, ModelConfig) else {"id": str(model)}
        return cls.checked({**given, **settings}, str(given["id"]), "model")

    def quantized(self, how: Quantization | None) -> ModelConfig:
        """The same model with blocks quantised in another way; ``None``: as they are."""
        ends = self.quantize_ends and how != "off"
        return self if how is None else self.model_copy(update={"quantization": how, "quantize_ends": ends})

    def on(self, device: str | Sequence[str] | None) -> ModelConfig:
        """The same model on another device; ``None``: where it is; several: in main memory, before it is spread."""
        if device is None:
            return self
        return self.model_copy(update={"device": device if isinstance(device, str) else "cpu"})

    def at(self, place: str | Path) -> ModelConfig:
        """The same model, found at ``place``."""
        return self.model_copy(update={"id": str(place)})

    def tuned(self, rank: int | None, *, checkpointing: bool = False) -> ModelConfig:
        """The same model with adapters of ``rank``; ``None``: with full tuning."""
        lora = LoraConfig() if rank is None else LoraConfig(rank=rank)
        update: dict[str, Any] = {"tuning": "full" if rank is None else "lora", "lora": lora}
        update |= {"train_embeddings": self.train_embeddings and rank is None, "gradient_checkpointing": checkpointing}
        return self.model_copy(update=update)
