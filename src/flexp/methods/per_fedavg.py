"""Per-FedAvg: an average that one step makes personal (Fallah et al., NeurIPS 2020, arXiv 2002.07948).

Client k's objective is F_k(w) = f_k(w − α ∇f_k(w)). A local step draws fresh batches D, D', D'' and follows

    u = w − α ∇f_k(w; D),    g = ∇f_k(u; D')
    first-order:    w ← w − η g                                                              (FO-MAML, the default)
    hessian-free:   w ← w − η [ g − α (∇f_k(w + δg; D'') − ∇f_k(w − δg; D'')) / 2δ ]         (HF-MAML)

α = ``method.per_fedavg.alpha`` is a plain SGD step that is not clipped; the outer step is ``train.personal``'s. The
personal model is the average after ``adapt_steps`` inner steps on the client's next training batches. With α = 0
there is no inner step to compute, and it is FedAvg. The exact second-order variant is not offered.

Budget: 2 gradient evaluations a step (first-order) or 4 (hessian-free). With ``budget = "equal"`` those and the final
adaptation are taken out of the run's ``rounds × steps_per_round``, spread evenly; fewer than one step's may remain
unspent. With ``"paper"`` a round has ``train.steps_per_round`` steps.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt

from flexp.config import OptimizerConfig, Rate, RunConfig, Section
from flexp.errors import ConfigError
from flexp.methods.base import Holds, OnStep, World
from flexp.methods.federated import Client, Federated, spread
from flexp.methods.harness import Weights, Worker
from flexp.optim import Updater


class PerFedAvg(Federated):
    """FedAvg of what is best one gradient step away (Fallah et al., 2020).

    Raises:
        ConfigError: adapting takes more gradient evaluations than the run has.
    """

    name = "per-fedavg"
    axis = ("method.per_fedavg.alpha", (0.01, 0.1))
    adapts = True

    class Config(Section):
        """An average that one gradient step makes personal."""

        alpha: Annotated[float, Field(ge=0.0)] = 0.01  # α, the rate of the inner SGD step; 0 is FedAvg
        variant: Literal["first-order", "hessian-free"] = "first-order"
        delta: Rate = 1e-3  # δ of the finite difference, hessian-free only
        adapt_steps: PositiveInt = 1  # inner steps that make a personal model out of the average

    @classmethod
    def holds(cls, config: RunConfig) -> Holds:
        """First-order: w, while the modules hold u. Hessian-free at its fourth gradient: w, g and ∇f(w + δg)."""
        settings: PerFedAvg.Config = cls.own(config)
        return Holds("whole", weights=0 if settings.alpha == 0 else 3 if settings.variant == "hessian-free" else 1)

    def __init__(self, world: World) -> None:
        self.settings: PerFedAvg.Config = self.own(world.config)
        alpha = self.settings.alpha
        self.inner = OptimizerConfig(name="sgd", lr=alpha, clip=None) if alpha else None
        self.adapt_steps = self.settings.adapt_steps if alpha else 0
        self.cost = 1 if not alpha else 2 if self.settings.variant == "first-order" else 4
        if world.config.method.budget == "equal" and self.adapt_steps > world.total_steps:
            raise ConfigError(
                f"method.per_fedavg.adapt_steps = {self.adapt_steps} is more than the run's {world.total_steps} "
                "gradient evaluations; use fewer, or method.budget = 'paper'"
            )
        super().__init__(world)

    def evaluations(self) -> dict[str, int]:
        total = self.world.total_steps
        return {"model": total if self.equal_budget else total * self.cost + self.adapt_steps}

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        if self.inner is None:
            return super().turn(client, received, number, on_step)
        steps = self.per_round
        if self.equal_budget:
            steps = spread((self.world.total_steps - self.adapt_steps) // self.cost, self.rounds, number)
        worker = client.workers["model"]
        self.harness.put(received)
        inner = Updater(self.harness.parameters, self.inner)
        with worker.optimiser(self.harness.parameters) as outer:
            for _ in range(steps):
                start = self.harness.take()
                worker.updater = inner
                on_step(worker.step())
                worker.updater = outer
                if self.cost == 2:
                    with self.harness.before_update(partial(self.harness.put, start)):
                        on_step(worker.step())
                else:
                    self._hessian_free(worker, outer, start, on_step)
        return self.harness.take()

    def personal_weights(self, client: Client) -> Weights:
        return self.adapt(client, self.adapt_steps, self.inner) if self.adapt_steps else self.server.weights

    def _hessian_free(self, worker: Worker, outer: Updater, start: Weights, on_step: OnStep) -> None:
        alpha, delta = self.settings.alpha, self.settings.delta
        worker.updater = collector = _Collector(self.harness.parameters, outer.config)
        on_step(worker.step())
        meta = collector.gradients
        moved: list[Weights] = []
        for sign in (1.0, -1.0):
            self.harness.put({name: start[name].add(value, alpha=sign * delta) for name, value in meta.items()})
            on_step(worker.step(again=bool(moved), same_noise=bool(moved)))  # else dropout would be differentiated
            moved.append(collector.gradients)
        self.harness.put(start)
        for name, value in meta.items():
            curvature = (moved[0][name] - moved[1][name]) / (2.0 * delta)  # ∇²f · g
            self.harness.parameters[name].grad = value - alpha * curvature
        worker.updater = outer
        outer.steps = worker.steps - 1
        outer.step()


class _Collector(Updater):
    """Keeps the gradients instead of applying them."""

    gradients: Weights

    def step(self, norm: float | None = None) -> float:
        self.gradients = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.gradients[name], parameter.grad = parameter.grad, None
        return float(torch.nn.utils.get_total_norm(list(self.gradients.values())))
