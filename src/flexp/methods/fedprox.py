"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg with local steps on f_k(w_k) + μ/2 ‖w_k − w‖².

w are the global weights that the round began with, μ = ``method.fedprox.mu``; the proximal gradient is part of the
gradient that is clipped and that the optimiser sees. The personal model of every client is w. Budget: exact (the term
costs no gradient evaluation). With μ = 0 it is FedAvg. All clients do equal work: the paper's partial work of
stragglers is not simulated here.
"""

from __future__ import annotations

from flexp.methods.base import OnStep
from flexp.methods.federated import Client, Federated
from flexp.methods.workbench import Weights


class FedProx(Federated):
    """FedAvg whose clients do not go far."""

    same_for_all = True

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        with self.bench.before_update(self.bench.pulled(received, self.world.config.method.fedprox.mu)):
            return super().turn(client, received, number, on_step)
