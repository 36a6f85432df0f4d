"""What transformers, its Trainer and trl ask of a model, answered for the client's part of one.

A split model is no ``PreTrainedModel``. What such a loop looks at decides what it computes (the class's name for label
smoothing, the signature for columns that it drops, ``loss_type`` for what it counts), so every answer is that of the
Hugging Face model inside.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn

from flexp.models.stage import Stage


class AskedModel(nn.Module):
    """Wraps the client's stage. ``model`` is the Hugging Face model, of which blocks are missing."""

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

    def enable_input_require_grads(self) -> None:
        """Nothing: the server's blocks get their backward whatever is frozen here."""

    def _get_name(self) -> str:
        return type(self.model).__name__


def _signed(outer: type[nn.Module], inner: type[nn.Module]) -> Any:
    """The forward of ``outer`` as if it were written with the parameters of ``inner``'s."""

    @functools.wraps(outer.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return outer.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(inner.forward)  # type: ignore[attr-defined]
    return forward
