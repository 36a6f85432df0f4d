"""What transformers, its Trainer and trl ask of a model, answered for the client's part of one.

A split model is no ``PreTrainedModel``. What such a loop looks at decides what it computes (the class's name for label
smoothing, the signature for columns that it drops, ``loss_type`` for what it counts), so every answer is that of the
Hugging Face model inside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

from torch import nn

from flexp.config import ModelConfig
from flexp.errors import ConfigError
from flexp.kinds import ModelKind
from flexp.models.loading import load_stage
from flexp.models.parts import Part
from flexp.models.stage import Stage


@dataclass(frozen=True)
class Source:
    """Where a model was loaded from, and how; so any part of it can be loaded again."""

    model: ModelConfig
    labels: Sequence[str] | None
    seed: int

    def load(self, kind: ModelKind, part: Part) -> Stage:
        """A part, without any training."""
        return load_stage(self.model, kind, part, labels=self.labels, seed=self.seed)


class AskedModel(nn.Module):
    """Wraps the client's stage. ``model`` is the Hugging Face model, of which blocks are missing.

    Attributes:
        source: where it is from; ``None``: it was not loaded, but carved out of another model.
    """

    write: ClassVar[Callable[..., None] | None] = None
    """What ``save_pretrained`` asks, as :func:`flexp.export.live.save` is called; ``flexp`` sets it."""

    source: Source | None = None

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.model: Any = stage.model
        self.forward = MethodType(_signed(type(self), type(self.model)), self)

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the whole model."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """How the model writes, if it does."""
        return getattr(self.model, "generation_config", None)

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss divides by ``num_items_in_batch``."""
        declared = getattr(self.model, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def loss_type(self) -> str | None:
        """The name of the model's loss, by which its items are counted."""
        return getattr(self.model, "loss_type", None)

    @property
    def main_input_name(self) -> str:
        """Which input holds the tokens or pixels."""
        return str(self.model.main_input_name)

    @property
    def model_tags(self) -> list[str] | None:
        """Words for a model card."""
        return getattr(self.model, "model_tags", None)

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """More words for a model card."""
        self.model.add_model_tags(tags)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings, which are the client's."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head, which is the client's."""
        found: nn.Module | None = self.model.get_output_embeddings()
        return found

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the client's part alone."""
        return int(self.model.num_parameters(only_trainable, exclude_embeddings))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Compute the client's own blocks again in the backward; the server's ``memory`` is its own matter."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        enable = enable or self.model.gradient_checkpointing_enable  # the older name
        enable({"use_reentrant": False} | dict(activation_checkpointing_kwargs or {}), **options)

    def save_pretrained(self, folder: str | Path, *, adapter: bool = False) -> None:
        """Write the personal model into a new folder that transformers loads; the server gives the middle, where it
        may (``allow_export``). No step may be under way.

        Args:
            adapter: of a model that is tuned with LoRA: the adapter alone, which peft loads over the pretrained model.

        Raises:
            ConfigError: the folder is taken, ``from_pretrained`` did not make the model, or it has no adapter.
            LinkError: the server does not give its blocks, or others train them all the time.
            StorageError: the disk is full or cannot be written; nothing is left in the folder.
        """
        if self.write is None:
            raise ConfigError("save_pretrained is there for flexp.SplitModelFor…; take the class from there")
        self.write(self, Path(folder), adapter=adapter)

    def _get_name(self) -> str:
        return type(self.model).__name__


def _signed(outer: type[nn.Module], inner: type[nn.Module]) -> Any:
    """The forward of ``outer`` as if it were written with the parameters of ``inner``'s."""

    @functools.wraps(outer.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return outer.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(inner.forward)  # type: ignore[attr-defined]
    return forward
