"""A method, an alignment and a codec of another package, found by its entry points."""

from __future__ import annotations

import torch
from torch import Tensor

from flexp.config import Fraction, Section
from flexp.links.codecs import Codec, Layout, Shape
from flexp.methods.base import World
from flexp.methods.federated import Federated
from flexp.server.alignment import Alignment


class HalfAverage(Federated):
    """FedAvg whose average moves only part of the way."""

    name = "half-average"
    same_for_all = True
    axis = ("method.half_average.share", (0.5, 1.0))

    class Config(Section):
        """How far."""

        share: Fraction = 0.5

    def __init__(self, world: World) -> None:
        self.settings: HalfAverage.Config = self.own(world.config)
        self.beta = self.settings.share
        super().__init__(world)


class L1(Alignment):
    """mean over H of |z − z'|."""

    name = "l1"

    @staticmethod
    def term(teacher_BTH: Tensor, student_BTH: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        difference = student_BTH - teacher_BTH
        return difference.abs().mean(-1), difference.sign() / student_BTH.shape[-1]


class Sign(Codec):
    """Every entry's sign, times the token's mean magnitude."""

    name = "sign"
    share = 0.25
    accuracy_loss = 0.02

    def layout(self, shape: Shape) -> Layout:
        return (torch.int8, shape), (torch.float32, shape[:-1])

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        return value.sign().to(torch.int8), value.float().abs().mean(-1)

    def decode(self, parts: tuple[Tensor, ...], hidden: int, dtype: torch.dtype) -> Tensor:
        signs, scales = parts
        return (signs.float() * scales.unsqueeze(-1)).to(dtype)
