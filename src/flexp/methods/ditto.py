"""Ditto (Li et al., ICML 2021, arXiv 2012.04221): FedAvg, and beside it a personal model tied to the average.

In a round with global weights w, client k takes FedAvg's local steps from w, and besides

    v_k ← v_k − η (∇f_k(v_k; batch) + λ (v_k − w))      ``personal_steps`` times

The personal model is v_k, with an optimiser of its own that lasts for the whole run; λ = ``method.ditto.lam``. With λ
= 0 it is local training. Budget: two models. With ``budget = "equal"`` ``method.ditto.personal_steps`` (default:
half, the larger if odd) of ``train.steps_per_round`` train v_k and the others the average; with ``"paper"`` the
average has all of them and v_k as many on top. Each model takes the client's batches in order from the first.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flexp.config import PositiveInt, Section
from flexp.methods.base import Holds, OnStep, World
from flexp.methods.federated import Client, Federated
from flexp.methods.harness import Weights, optimizer_state


class Ditto(Federated):
    """FedAvg and a second, personal model, tied to the average (Li et al., 2021)."""

    name = "ditto"
    # While v_k trains: the received w, v_k, and v_k's optimiser, which lasts.
    held = Holds("whole", weights=2, optimizers=1)
    axis = ("method.ditto.lam", (0.1, 1.0))
    scored_with_average = False

    class Config(Section):
        """A personal model beside the average, tied to it."""

        lam: Annotated[float, Field(ge=0.0)] = 0.1  # λ; 0 is local training
        # a round; None: half of the budget, or all of it with budget = "paper"
        personal_steps: PositiveInt | None = None

    def __init__(self, world: World) -> None:
        self.settings: Ditto.Config = self.own(world.config)
        super().__init__(world)

    def evaluations(self) -> dict[str, int]:
        self.common_steps, self.personal_steps = self.half_of_round(
            self.settings.personal_steps, "ditto.personal_steps"
        )
        return {"model": self.rounds * self.common_steps, "personal": self.rounds * self.personal_steps}

    def own_models(self) -> dict[str, Weights]:
        return {"personal": self.harness.take(), "optimizer": {}, "personal-optimizer": {}}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        sent = self.local_steps(client, received, self.common_steps, on_step)
        worker, parameters = client.workers["personal"], self.harness.parameters
        self.harness.put(client.kept["personal"])
        pull = self.harness.pulled(received, self.settings.lam)
        with (
            self.harness.before_update(pull),
            worker.optimiser(parameters, client.kept["personal-optimizer"]) as updater,
        ):
            for _ in range(self.personal_steps):
                on_step(worker.step())
            client.kept["personal-optimizer"] = optimizer_state(updater, parameters)
        client.kept["personal"] = self.harness.take()
        return sent

    def personal_weights(self, client: Client) -> Weights:
        return client.kept["personal"]
