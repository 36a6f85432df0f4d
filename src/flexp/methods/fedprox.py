"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg with local steps on f_k(w_k) + μ/2 ‖w_k − w‖².

w are the global weights that the round began with, μ = ``method.fedprox.mu``; the proximal gradient is part of the
gradient that is clipped and that the optimiser sees. The personal model of every client is w. Budget: exact (the term
costs no gradient evaluation). With μ = 0 it is FedAvg. All clients do equal work: the paper's partial work of
stragglers is not simulated here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flexp.config import Section
from flexp.methods.base import Holds, OnStep, World
from flexp.methods.federated import Client, Federated
from flexp.methods.harness import Weights


class FedProx(Federated):
    """FedAvg with a proximal term: clients do not go far (Li et al., 2020)."""

    name = "fedprox"
    same_for_all = True
    held = Holds("whole", weights=1)  # the received w, which the term pulls to
    axis = ("method.fedprox.mu", (0.1, 0.01))
    effort = 0.8

    class Config(Section):
        """FedAvg with a proximal term."""

        mu: Annotated[float, Field(ge=0.0)] = 0.1  # μ; 0 is FedAvg

    def __init__(self, world: World) -> None:
        self.settings: FedProx.Config = self.own(world.config)
        super().__init__(world)

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        with self.harness.before_update(self.harness.pulled(received, self.settings.mu)):
            return super().turn(client, received, number, on_step)
