"""What a client owns of a split model: its state, and what transformers' Trainer asks of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexp.client.tied import save_ties_once
from flexp.errors import ModelError
from flexp.models.stage import Stage


class PersonalModel(nn.Module):
    """The client's stage as a module."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.model: Any = stage.model
        save_ties_once(self)

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the whole model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the personal parameters are."""
        device: torch.device = self.model.device
        return device

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss divides by ``num_items_in_batch``, which transformers' Trainer asks."""
        declared = getattr(self.model, "accepts_loss_kwargs", None)
        if declared is not None:
            return bool(declared)
        parameters = inspect.signature(self.model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def loss_type(self) -> str | None:
        """The name of the model's loss, by which transformers' Trainer knows how to count its items."""
        return getattr(self.model, "loss_type", None)

    def personal_state(self) -> dict[str, Tensor]:
        """All that is this client's own, by name: what it trains, and what it follows. It never leaves the client."""
        return {name: value.detach() for name, value in self.stage.own().items()}

    def load_personal_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`personal_state`.

        Raises:
            ModelError: the state is of another cut or another tuning.
        """
        own = self.stage.own()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())[0]
            raise ModelError(f"the saved personal state does not fit this cut and tuning: {odd} is on one side only")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
