"""What a client owns of a model: its state.

Tied parameters are one tensor in a saved state, written once: safetensors refuses two names for one tensor, and the
Trainer saves the state of whatever is no PreTrainedModel as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexp.client.asked import AskedModel
from flexp.client.exchange import Piece
from flexp.errors import ModelError
from flexp.models.stage import Stage


class PersonalModel(AskedModel):
    """The client's stage as a module."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        save_ties_once(self)
        self.register_load_state_dict_pre_hook(_refuse_other_blocks)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """Where the personal parameters are."""
        device: torch.device = self.model.device
        return device

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


def _refuse_other_blocks(model: PersonalModel, state: dict[str, Any], *_: Any) -> None:
    """Whoever loads without being strict (a Trainer) would go on with some blocks as they were pretrained."""
    blocks = [model.stage.block_of(name.removeprefix("model.")) for name in state]
    there = {block for block in blocks if block is not None}
    if there and there != model.stage.part.blocks:
        raise ModelError(
            f"the saved state has the blocks {sorted(there)}, this client's are {sorted(model.stage.part.blocks)}; use "
            "the cut that it was saved with"
        )


def _fill(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for alias, name in _aliases(module).items():
        if prefix + name in state:
            state.setdefault(prefix + alias, state[prefix + name])
