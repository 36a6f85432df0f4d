"""pFedMe: personal models by Moreau envelopes (Dinh, Tran and Nguyen, NeurIPS 2020, arXiv 2006.08848).

Client i minimises the envelope F_i(w) = min_θ f_i(θ) + λ/2 ‖θ − w‖², whose gradient is λ (w − θ_i(w)). In a round:

    w_i ← w                                                          local copy of the global weights
    R times:  draw a batch
              θ_i ← K optimiser steps on f_i(θ; batch) + λ/2 ‖θ − w_i‖²   approximate solve, from the last θ_i
              w_i ← w_i − η λ (w_i − θ_i)
    w ← (1 − β) w + β Σ n_i/n · w_i

θ_i starts a round at w, with a fresh optimiser. The personal model is θ_i. Settings: ``method.pfedme.lam`` λ,
``inner_steps`` K, ``eta`` η (default 1/λ, the gradient step for a λ-smooth function, with which w_i follows θ_i; the
paper uses η = 0.005 with λ = 15), ``beta`` β. Differences from the paper: the mean is weighted by examples, and the
inner solver is ``train.personal`` (the paper's analysis admits any solver; its experiments use gradient descent).

Budget: a step of the inner solve is a gradient evaluation on a full batch. With ``budget = "equal"`` a round has R =
``train.steps_per_round`` / K local rounds, the last with what remains if K does not divide it; K evaluations share a
batch, so fewer distinct examples are seen. With ``"paper"`` R = ``train.steps_per_round``.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt

from flexp.config import Rate, Section
from flexp.methods.base import Holds, OnStep, World
from flexp.methods.federated import Client, Federated
from flexp.methods.harness import Weights


class PFedMe(Federated):
    """Personal models by Moreau envelopes: all is averaged, and all has a personal version (Dinh et al., 2020)."""

    name = "pfedme"
    held = Holds("whole", weights=1)  # w_i beside θ_i
    axis = ("method.pfedme.lam", (15.0, 1.0))
    scored_with_average = False

    class Config(Section):
        """Personal models by Moreau envelopes."""

        lam: Rate = 15.0  # λ, the pull of a personal model towards the local one
        inner_steps: PositiveInt = 5  # K, gradient evaluations of one approximate solve, all on one batch
        eta: Rate | None = None  # η of the outer step; None: 1/λ, the classical step for a λ-smooth function
        beta: Rate = 1.0  # β of the server's mixing

    def __init__(self, world: World) -> None:
        self.settings: PFedMe.Config = self.own(world.config)
        self.beta, self.lam = self.settings.beta, self.settings.lam
        self.outer = 1.0 if self.settings.eta is None else self.settings.eta * self.lam
        super().__init__(world)

    def evaluations(self) -> dict[str, int]:
        return {"model": self.rounds * sum(self._inner_steps())}

    def own_models(self) -> dict[str, Weights]:
        return {"personal": self.harness.take()}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        worker, parameters = client.workers["model"], self.harness.parameters
        local = {name: value.clone() for name, value in received.items()}
        self.harness.put(received)
        with self.harness.before_update(self.harness.pulled(local, self.lam)), worker.optimiser(parameters):
            for steps in self._inner_steps():
                for inner in range(steps):
                    on_step(worker.step(again=inner > 0))
                with torch.no_grad():
                    for name, value in local.items():
                        value.lerp_(parameters[name], self.outer)  # w − ηλ (w − θ)
        client.kept["personal"] = self.harness.take()
        return local

    def personal_weights(self, client: Client) -> Weights:
        return client.kept["personal"]

    def _inner_steps(self) -> list[int]:
        """The gradient evaluations of each of a round's R approximate solves."""
        most = self.settings.inner_steps
        if not self.equal_budget:
            return [most] * self.per_round
        return [min(most, self.per_round - done) for done in range(0, self.per_round, most)]
