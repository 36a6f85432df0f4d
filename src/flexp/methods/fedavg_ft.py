"""FedAvg + local fine-tuning: the average, fine-tuned by every client for itself (a strong baseline; see Cheng,
Chadha and Duchi, 2021, arXiv 2108.07313, and Collins et al., 2022, arXiv 2205.13692).

After FedAvg a client takes F = ``method.fedavg_ft.finetune_steps`` steps (default: ``train.steps_per_round``) from
the average with a fresh optimiser, and the result is its personal model. With ``finetune_schedule = "rest"`` they have
what the run's schedule has left of the learning rate, with ``"own"`` averaging and fine-tuning each go through the
schedule once; which is better depends on the task (docs/results.md). Scoring after any round fine-tunes that round's
average in the same way and leaves no trace in the training.

Budget: fine-tuning happens once, at the end. With ``budget = "equal"`` its F steps are taken from the averaging
rounds, spread evenly, so that a client's steps in the whole run are FedAvg's to the last one; with ``"paper"`` they
are on top.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from flexp.config import Rate, Section
from flexp.errors import ConfigError
from flexp.methods.base import Axis, OnStep, World, of_a_round
from flexp.methods.federated import Client, Federated, spread
from flexp.methods.harness import Weights


class FedAvgFt(Federated):
    """FedAvg whose clients fine-tune the average.

    Raises:
        ConfigError: fine-tuning takes more steps than the run has.
    """

    name = "fedavg-ft"
    axis: ClassVar[Axis] = ("method.fedavg_ft.finetune_steps", of_a_round(1.0, 0.5))
    effort = 1.3
    adapts = True

    class Config(Section):
        """FedAvg, then local fine-tuning of the average."""

        finetune_steps: PositiveInt | None = None  # None: train.steps_per_round
        finetune_lr: Rate | None = None  # peak of the schedule while fine-tuning; None: train.personal.lr
        # of the run's schedule what is left, or one of its own after averaging's
        finetune_schedule: Literal["rest", "own"] = "rest"

    def __init__(self, world: World) -> None:
        self.settings: FedAvgFt.Config = self.own(world.config)
        self.finetune_steps = self.settings.finetune_steps or world.config.train.steps_per_round
        self.anew = self.settings.finetune_schedule == "own"
        if world.config.method.budget == "equal" and self.finetune_steps > world.total_steps:
            raise ConfigError(
                f"method.{self.table}.finetune_steps = {self.finetune_steps} is more than the run's "
                f"{world.total_steps} steps; use fewer, or method.budget = 'paper'"
            )
        self.averaging_steps = world.total_steps
        if world.config.method.budget == "equal":
            self.averaging_steps -= self.finetune_steps
        super().__init__(world)

    def evaluations(self) -> dict[str, int]:
        return {"model": self.averaging_steps + (0 if self.anew else self.finetune_steps)}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        return self.local_steps(client, received, spread(self.averaging_steps, self.rounds, number), on_step)

    def personal_weights(self, client: Client) -> Weights:
        rate, train = self.settings.finetune_lr, self.world.config.train.personal
        optimizer = train if rate is None else train.model_copy(update={"lr": rate})
        return self.adapt(client, self.finetune_steps, optimizer, anew=self.anew)
