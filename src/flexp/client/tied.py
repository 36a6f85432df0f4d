"""Tied parameters in a saved state: one tensor, written once.

safetensors refuses two names for one tensor, and transformers' Trainer saves the state of whatever is no
PreTrainedModel as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn


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
