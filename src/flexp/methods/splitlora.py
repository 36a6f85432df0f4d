"""SplitLoRA: split learning of LoRA adapters on both sides (Lin et al., 2024, arXiv 2407.00952).

L-shaped: clients have embeddings and blocks [0, s), the server has the rest, the head and the labels
(:mod:`flexp.methods.two_sided`; s is ``method.splitlora.cut``). Adapters are trained on both sides, and a head that is
new. All clients step together: the server joins their batches in one, so that its gradient is that of the mean loss of
all of them, and takes one step; every client gets the gradient of the mean loss of its own batch, so that its step is
not the smaller the more take part. After every I = ``method.splitlora.average_every`` rounds

    clients' adapters ← Σ n_k/n · adapters_k

and they begin anew with fresh optimisers; in between, adapters and optimisers are a client's own. The server's
optimiser lasts. The batches are computed one after the other here, which gives the same gradients (to rounding, where
joining them would have padded some).

The personal model is the client's adapters, averaged or not, under the server's side. With one client and one round it
is local training with LoRA. Budget: exact; the server takes as many steps as one client. Bytes: activations, masks and
labels up, gradients down in every step; the client's adapters both ways for every average.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from pydantic import PositiveInt
from torch import nn

from flexp.config import RunConfig
from flexp.cost.clock import Schedule
from flexp.errors import ConfigError
from flexp.methods.base import OnStep, World
from flexp.methods.federated import Client
from flexp.methods.harness import Weights, optimizer_state
from flexp.methods.two_sided import TwoSided

Own = dict[str, nn.Parameter]


class SplitLora(TwoSided):
    """Split learning of LoRA adapters: all clients' batches are one step of the server (Lin et al., 2024).

    Raises:
        ConfigError: nothing is adapted.
    """

    name = "splitlora"
    timing = Schedule("split-sync", together=True)
    together = True

    class Config(TwoSided.Config):
        """Adapters on both sides of the split."""

        average_every: PositiveInt = 1  # rounds between two averages of the clients' adapters

    @classmethod
    def schedule(cls, config: RunConfig) -> Schedule:
        settings: SplitLora.Config = cls.own(config)
        return replace(cls.timing, average_every=settings.average_every)

    def __init__(self, world: World) -> None:
        if world.config.model.tuning != "lora":
            raise ConfigError("method splitlora trains LoRA adapters on both sides: it needs model.tuning = 'lora'")
        self.settings: SplitLora.Config = self.own(world.config)
        self.every = self.settings.average_every
        super().__init__(world)

    def own_models(self) -> dict[str, Weights]:
        return {"personal": self.harness.take(self.shared), "optimizer": {}}

    def personal_weights(self, client: Client) -> Weights:
        return client.kept["personal"]

    def train_round(self, number: int, on_step: OnStep) -> None:
        if (number - 1) % self.every == 0:
            for client in self.participants:
                client.version = self.server.version
                client.meter.training.bytes_down += self.bytes_of(client, self.server.weights)
        with ExitStack() as stack:
            sides: list[tuple[Client, Own]] = []
            for client in self.participants:
                own = {name: nn.Parameter(value.clone()) for name, value in client.kept["personal"].items()}
                stack.enter_context(client.workers["model"].optimiser(own, client.kept["optimizer"]))
                sides.append((client, own))
            for _ in range(self.per_round):
                self._step_together(sides, on_step)
            for client, own in sides:
                client.kept["personal"] = {name: value.detach() for name, value in own.items()}
                client.kept["optimizer"] = optimizer_state(client.workers["model"].updater, own)
        if number % self.every == 0:
            self._average()
        self.harness.holds = None

    def _step_together(self, sides: list[tuple[Client, Own]], on_step: OnStep) -> None:
        gradients: list[tuple[Weights, int]] = []
        for client, own in sides:
            self.harness.meter = client.meter
            self.harness.put(own)
            found: Weights = {}

            def hand_over(own: Own = own, found: Weights = found) -> None:
                for name, parameter in self.harness.parameters.items():
                    gradient, parameter.grad = parameter.grad, None
                    if name in own:
                        own[name].grad = gradient
                    elif gradient is not None:
                        found[name] = gradient

            with self.harness.before_update(hand_over):
                step = client.workers["model"].step()
            client.seconds += step.seconds
            gradients.append((found, step.items))
            on_step(step)
        began = time.perf_counter()
        for name, value in _mean(gradients).items():
            self.harness.parameters[name].grad = value
        self.lasting.step()
        self.updates += 1
        self.server.seconds += time.perf_counter() - began

    def _average(self) -> None:
        for client in self.participants:
            client.meter.training.bytes_up += self.bytes_of(client, client.kept["personal"])
            client.meter.training.exchanges += 1
            self.server.receive(client.kept["personal"], client.share)
        self.server.finish()
        for client in self.participants:
            client.kept["personal"], client.kept["optimizer"] = dict(self.server.weights), {}


def _mean(gradients: list[tuple[Weights, int]]) -> Weights:
    """The gradient of the mean loss over all items of all batches."""
    everything = sum(items for _, items in gradients)
    means: Weights = {}
    for found, items in gradients:
        for name, value in found.items():
            part = value * (items / everything)
            means[name] = means[name] + part if name in means else part
    return means
