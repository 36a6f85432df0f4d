"""FedRep (Collins et al., ICML 2021, arXiv 2102.07078): FedPer's two parts, trained one after the other.

In a round a client first trains its personal head for ``method.fedrep.head_steps`` steps with the received body
frozen, then the body with its head frozen, and sends the body. Which weights are the head is said as for FedPer
(``classifier``, ``last_blocks``). The head's optimiser lasts, the body's is fresh each round. The personal model is
the averaged body with the client's own head.

Budget: a step of either phase is a gradient evaluation. With ``budget = "equal"`` the head's (default: half, the
larger if odd) are taken out of ``train.steps_per_round``; with ``"paper"`` the body has all of them and the head as
many on top. Steps of the head alone are cheaper, which the seconds show.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import PositiveInt

from flexp.errors import ConfigError
from flexp.methods.base import OnStep, World, of_a_round
from flexp.methods.federated import Client
from flexp.methods.fedper import FedPer
from flexp.methods.harness import Weights, optimizer_state


class FedRep(FedPer):
    """FedPer's two parts trained one after the other: the head, then the representation.

    Raises:
        ConfigError: there is no head or no body, or a phase has no steps.
    """

    name = "fedrep"
    axis = ("method.fedrep.head_steps", of_a_round(0.5, 0.25))

    class Config(FedPer.Config):
        """FedPer's parts, trained one after the other."""

        # a round; None: half of the budget, or all of it with budget = "paper"
        head_steps: PositiveInt | None = None

    settings: FedRep.Config

    def __init__(self, world: World) -> None:
        super().__init__(world)
        if len(self.shared) == len(self.harness.parameters):
            raise ConfigError("method fedrep: nothing is personal; set method.fedrep.classifier or last_blocks")

    @property
    def phases(self) -> Sequence[tuple[Collection[str] | None, float]]:
        head = self.head_steps / (self.head_steps + self.body_steps)
        return [(self.shared, 1.0 - head), (self.harness.parameters.keys() - self.shared, head)]

    def evaluations(self) -> dict[str, int]:
        self.body_steps, self.head_steps = self.half_of_round(self.settings.head_steps, "fedrep.head_steps")
        return {"model": self.rounds * (self.body_steps + self.head_steps)}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        worker, own = client.workers["model"], client.kept["personal"].keys()
        head = {name: self.harness.parameters[name] for name in own}
        body = {name: self.harness.parameters[name] for name in sorted(self.shared)}
        self.harness.put({**received, **client.kept["personal"]})
        with self.harness.frozen_except(own), worker.optimiser(head, client.kept["optimizer"]) as updater:
            for _ in range(self.head_steps):
                on_step(worker.step())
            client.kept["optimizer"] = optimizer_state(updater, own)
        client.kept["personal"] = self.harness.take(own)
        with self.harness.frozen_except(self.shared), worker.optimiser(body):
            for _ in range(self.body_steps):
                on_step(worker.step())
        return self.harness.take(self.shared)
