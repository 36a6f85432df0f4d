"""APFL: adaptive personalized federated learning (Deng, Kamani and Mahdavi, 2020, arXiv 2003.13461).

Client i trains its copy w_i of the average w as FedAvg does, and a personal v_i through the mixture v̄_i = α_i v_i +
(1 − α_i) w_i, both on the same batch:

    w_i ← w_i − η ∇f_i(w_i; batch),    v_i ← v_i − η α_i ∇f_i(v̄_i; batch)

On a round's first step α_i ← α_i − η_α ⟨∇f_i(v̄_i), v_i − w_i⟩, kept within [0, 1] (η_α = ``method.apfl.alpha_lr``;
at 0 it stays ``method.apfl.alpha``). The personal model is v̄_i with the newest average for w_i. With α = 0 (fixed)
it is FedAvg, with α = 1 local training. v_i has an optimiser of its own that lasts for the whole run.

Budget: 2 gradient evaluations a step. With ``budget = "equal"`` a run has ``rounds × steps_per_round`` / 2 steps,
spread evenly over its rounds; with ``"paper"`` a round has ``train.steps_per_round``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from flexp.config import Fraction, Section
from flexp.methods.base import Holds, OnStep, World
from flexp.methods.federated import Client, Federated, spread
from flexp.methods.harness import Weights, optimizer_state


class Apfl(Federated):
    """FedAvg and a second, personal model, mixed (Deng et al., 2020)."""

    name = "apfl"
    held = Holds("whole", weights=2, optimizers=1)  # w_i and v_i beside their mixture, each with an optimiser
    axis = ("method.apfl.alpha", (0.5, 0.75))

    class Config(Section):
        """A mixture of a personal model and the average."""

        alpha: Fraction = 0.5  # α at the start: 0 is FedAvg, 1 is local training
        alpha_lr: Annotated[float, Field(ge=0.0)] = 0.1  # of α, which is adapted once a round; 0: fixed

    def __init__(self, world: World) -> None:
        self.settings: Apfl.Config = self.own(world.config)
        super().__init__(world)

    def evaluations(self) -> dict[str, int]:
        self.steps = self.world.total_steps // 2 if self.equal_budget else self.world.total_steps
        return {"model": self.steps, "personal": self.steps}

    def own_models(self) -> dict[str, Weights]:
        alpha = torch.tensor(self.settings.alpha, dtype=torch.float64)
        return {"personal": self.harness.take(), "optimizer": {}, "mixture": {"alpha": alpha}}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        common, personal = client.workers["model"], client.workers["personal"]
        w = {name: nn.Parameter(value.clone()) for name, value in received.items()}
        v = {name: nn.Parameter(value.clone()) for name, value in client.kept["personal"].items()}
        with common.optimiser(w), personal.optimiser(v, client.kept["optimizer"]) as updater:
            for step in range(spread(self.steps, self.rounds, number)):
                # v first: its mixture and α's slope are of both as they are before this step, with no copy of either.
                self.harness.put(mix(v, w, self._alpha(client)))
                with self.harness.before_update(self._hand_over(v, client, w if step == 0 else None)):
                    on_step(personal.step())
                self.harness.put(w)
                with self.harness.before_update(self._hand_over(w)):
                    on_step(common.step())
            client.kept["optimizer"] = optimizer_state(updater, v)
        client.kept["personal"] = {name: value.detach() for name, value in v.items()}
        return {name: value.detach() for name, value in w.items()}

    def personal_weights(self, client: Client) -> Weights:
        return mix(client.kept["personal"], self.server.weights, self._alpha(client))

    def _alpha(self, client: Client) -> float:
        return float(client.kept["mixture"]["alpha"])

    def _hand_over(
        self,
        to: Mapping[str, nn.Parameter],
        mixing: Client | None = None,
        common: Mapping[str, nn.Parameter] | None = None,
    ) -> Callable[[], None]:
        """Give the harness's gradients to other parameters; for the mixture, by the chain rule, and to α as well.

        Args:
            mixing: whose mixture the harness holds.
            common: w, when α is to move.
        """

        def act() -> None:
            gradients: Weights = {}
            for name, parameter in self.harness.parameters.items():
                if parameter.grad is not None:
                    gradients[name], parameter.grad = parameter.grad, None
            alpha = 1.0 if mixing is None else self._alpha(mixing)
            for name, value in gradients.items():
                to[name].grad = value * alpha
            if mixing is not None and common is not None and self.settings.alpha_lr:
                slope = sum(
                    float((value.double() * (to[name] - common[name]).detach().double()).sum())
                    for name, value in gradients.items()
                )
                moved = min(1.0, max(0.0, alpha - self.settings.alpha_lr * slope))
                mixing.kept["mixture"]["alpha"] = torch.tensor(moved, dtype=torch.float64)

        return act


def mix(personal: Mapping[str, Tensor], common: Mapping[str, Tensor], alpha: float) -> Weights:
    """α · personal + (1 − α) · common, exact at both ends."""
    return {name: torch.lerp(common[name].detach(), value.detach(), alpha) for name, value in personal.items()}
