"""From a personal model's weights to one plain model, without adapters, that transformers can save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flexp.models.anatomy import Part
from flexp.models.quantized import unpacked
from flexp.models.stage import Stage, carve

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


def adapted(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters by the full names of the layers that they adapt: A (r, in) and B (out, r)."""
    layers = [name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)]
    return {layer: (weights[layer + DOWN], weights[layer + UP]) for layer in layers}


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was trained besides adapters, by the names that it has in a model without any."""
    rest = {name: value for name, value in weights.items() if not name.endswith((DOWN, UP))}
    return {name.replace(".base_layer.", "."): value for name, value in rest.items()}


def merged(source: Stage, weights: Mapping[str, Tensor], scaling: float, dtype: torch.dtype | None = None) -> Any:
    """The whole pretrained model with trained weights in it; ``source`` is left as it is.

    What was trained in full is taken over bit for bit, adapters are added in float32: W + scaling · B·A. Quantised
    blocks become plain ones with the numbers that they stood for in training.

    Args:
        source: the whole pretrained model, with which tensors are shared that nothing changes.
        scaling: of the adapters, alpha / rank.
        dtype: of all weights; ``None``: as they are.
    """
    own = {name: value.detach().clone() for name, value in weights.items()}
    return fill(carve(source, Part.whole(source.anatomy.blocks)).model, own, scaling, dtype)


def fill(model: Any, weights: Mapping[str, Tensor], scaling: float, dtype: torch.dtype | None = None) -> Any:
    """The same in place, in a model of which all or only a part is there.

    What was trained in full is not copied, but becomes the model's own; the old tensors stay as they are.
    """
    unpacked(model, model.dtype)
    new = {name: value.to(model.get_parameter(name).dtype) for name, value in plain(weights).items()}
    for layer, (down, up) in adapted(weights).items():
        module, name = model.get_submodule(layer), f"{layer}.weight"
        change = scaling * (up.float() @ down.float())
        base = new.get(name, module.weight.detach())
        new[name] = (base.float() + (change.T if isinstance(module, Conv1D) else change)).to(base.dtype)
    if dtype is not None:
        everything = {name: value.detach() for name, value in model.named_parameters()} | new
        new = {name: value.to(dtype) for name, value in everything.items()}
    _install(model, new)
    return model.eval()


def let_go(model: nn.Module) -> None:
    """Models hold themselves and would stay until Python looks for such rings: take their tensors out at once."""
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()


def _install(model: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters, under every name that a tied one has."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    for name, old in [(name, model.get_parameter(name)) for name in new]:
        fresh = nn.Parameter(new[name].detach(), requires_grad=False)
        for module, leaf in places[id(old)]:
            module._parameters[leaf] = fresh
