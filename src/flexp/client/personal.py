"""What a client owns of a model: its state, and what transformers' Trainer asks of a model.

Tied parameters are one tensor in a saved state, written once: safetensors refuses two names for one tensor, and the
Trainer saves the state of whatever is no PreTrainedModel as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexp.client.exchange import Piece
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


class WholeModel:
    """A whole model behind the interface of a split one, for clients that hold all of it; nothing crosses any link."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.last_align: float | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        first: Tensor = next(iter(self.stage.model.parameters()))
        return first.device

    def __call__(self, **batch: Any) -> Any:
        with self.stage.computing():
            return self.stage.model(**batch, **self.stage.no_cache)

    def train(self, mode: bool = True) -> WholeModel:
        self.stage.model.train(mode)
        return self

    @contextmanager
    def part_of_step(self, piece: Piece) -> Iterator[None]:
        yield

    def after_step(self) -> None:
        pass

    def personal_state(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.stage.trainable().items()}

    def load_personal_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.stage.trainable().items():
                parameter.copy_(state[name])


def save_ties_once(module: nn.Module) -> None:
    """Let ``module.state_dict()`` name every tied parameter once, and ``load_state_dict`` understand that."""
    module.register_state_dict_post_hook(_drop)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(_fill)  # type: ignore[no-untyped-call]


def _aliases(module: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, each with the name that is kept."""
    first = {id(value): name for name, value in module.named_parameters()}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in named if first[id(value)] != name}


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for alias in _aliases(module):
        state.pop(prefix + alias, None)


def _fill(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for alias, name in _aliases(module).items():
        if prefix + name in state:
            state.setdefault(prefix + alias, state[prefix + name])
