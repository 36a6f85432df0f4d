"""FedBABU (Oh, Kim and Yun, ICLR 2022, arXiv 2106.06042): the body is trained and averaged, the head stands still.

All clients begin with one head (drawn, or the closed form of a first meeting) and nobody trains it, so that their
bodies meet in one space of features; after the last average every client fine-tunes body and head for itself. It is
FedAvg + fine-tuning (:mod:`flexp.methods.fedavg_ft`, whose settings and budget it has) without the head in the rounds:
with as many fine-tuning steps as the run has it is local training. Bytes: the body, both ways, every round.
"""

from __future__ import annotations

from flexp.errors import ConfigError
from flexp.methods.base import OnStep, World, of_a_round
from flexp.methods.fedavg_ft import FedAvgFt
from flexp.methods.federated import Client
from flexp.methods.harness import Weights


class FedBabu(FedAvgFt):
    """FedAvg of the body under a head that stands still until clients fine-tune both (Oh et al., 2022).

    Raises:
        ConfigError: no head of its own is trained, or fine-tuning takes more steps than the run has.
    """

    name = "fedbabu"
    axis = ("method.fedbabu.finetune_steps", of_a_round(1.0, 0.5))

    class Config(FedAvgFt.Config):
        """FedAvg of the body, then local fine-tuning of body and head."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        if len(self.shared) == len(self.harness.parameters):
            raise ConfigError(
                f"method fedbabu: this model has no head of its own that is trained (model.tuning = "
                f"{world.config.model.tuning!r}), so that it would be fedavg-ft: name that"
            )

    def is_shared(self, name: str) -> bool:
        return not self.harness.in_head(name)

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        with self.harness.frozen_except(self.shared):
            return super().turn(client, received, number, on_step)
