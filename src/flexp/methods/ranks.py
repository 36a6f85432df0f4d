"""Averages of weights that not everybody has, or not everybody at the same rank.

A client with a LoRA adapter of rank r holds the first r rows of A and columns of B of the full one. Padded with zeros
they are the same function, B·A, provided that the scaling is one number for all ranks: here alpha / the largest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from flexp.client.averaging import Mean
from flexp.methods.harness import Weights


def fit(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The first entries of ``value`` along every dimension, and zeros where ``shape`` asks for more."""
    if value.shape == tuple(shape):
        return value
    fitted = value.new_zeros(tuple(shape))
    common = tuple(slice(min(have, want)) for have, want in zip(value.shape, shape, strict=True))
    fitted[common] = value[common]
    return fitted


def of_rank(name: str, value: Tensor, rank: int) -> Tensor:
    """What a client of ``rank`` holds of a parameter: of an adapter's A (r, in) and B (out, r) its part, else all."""
    if "lora_A" in name:
        return value[:rank]
    return value[:, :rank] if "lora_B" in name else value


def average(parts: Mapping[str, Weights], examples: Mapping[str, int]) -> Weights:
    """For every name the mean over those who have it, weighted by their examples, as over a network
    (:mod:`flexp.client.averaging`).

    Shapes may differ: what is smaller is padded with zeros to the largest.

    Args:
        parts: the weights of each client, by its name.
        examples: how many each client has.
    """
    mean, everything = Mean(), sum(examples[client] for client in parts)
    shapes = {
        name: [max(sizes) for sizes in zip(*(one[name].shape for one in parts.values() if name in one), strict=True)]
        for name in sorted({name for weights in parts.values() for name in weights})
    }
    kinds = {name: value.dtype for weights in parts.values() for name, value in weights.items()}
    for client, weights in parts.items():
        fitted = {name: fit(weights[name], shape) for name, shape in shapes.items() if name in weights}
        mean.add(fitted, examples[client] / everything)
    return {name: value.to(kinds[name]) for name, value in mean.take().items()}
