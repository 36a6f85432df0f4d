"""What a method is: it trains every client's personal model, round by round, and can be saved and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flexp.client.trainer import Step
from flexp.config import RunConfig
from flexp.data.types import ClientData, Federation
from flexp.links.base import Traffic
from flexp.models.stage import Stage

Forward = Callable[[Mapping[str, Tensor]], Any]
OnStep = Callable[[Step], None]
State = dict[str, dict[str, Tensor]]
"""Party → flat named tensors. ``server`` is the server; every other party is a client."""


@dataclass(frozen=True)
class World:
    """What every method starts from.

    Attributes:
        source: the whole pretrained model, frozen. All parties are carved out of it and share its tensors.
        cuts: (s, e) of each client, by name, as the method uses them (:mod:`flexp.methods.cuts`).
        absent: clients whose device cannot hold what the method trains there. They take no part in training and are
            scored with what they have all the same: the average, where there is one, else the pretrained model.
        plan: what the cuts were planned by (``plan.json``), where they were not written down.
    """

    config: RunConfig
    federation: Federation
    source: Stage
    cuts: dict[str, tuple[int, int]]
    absent: frozenset[str] = frozenset()
    plan: Mapping[str, Any] | None = None

    @property
    def participants(self) -> list[ClientData]:
        """The clients that train, in their order."""
        return [client for client in self.federation.clients if client.name not in self.absent]

    @property
    def participant_names(self) -> list[str]:
        """Their names."""
        return [client.name for client in self.participants]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of one client in the whole run."""
        return self.config.train.total_steps


@dataclass(frozen=True)
class Account:
    """What a client has spent so far; every figure was metered where it arose.

    Attributes:
        personal_parameters: of its personal model, those that it shares with nobody.
        client_seconds: computing on the client, waiting not counted.
        server_seconds: computing on the server for this client.
        gradient_evaluations: losses and gradients of one batch that it computed, or had computed.
    """

    personal_parameters: int
    training: Traffic
    evaluation: Traffic
    client_seconds: float
    server_seconds: float
    gradient_evaluations: int = 0


class Method(Protocol):
    """A way to give every client its own model.

    Where that is one and the same model for all, the class says ``same_for_all = True``, and everybody's test data are
    scored once.
    """

    @property
    def world(self) -> World:
        """What it was made from, with the settings that it uses itself."""

    def train_round(self, number: int, on_step: OnStep) -> None:
        """Let every client have its turn of ``train.steps_per_round`` steps. Rounds count from 1."""
        ...

    def personal(self, client: str) -> Forward:
        """The personal model of ``client``, for evaluation: takes a batch, gives an output with ``logits``."""
        ...

    def trained_weights(self, client: str) -> dict[str, Tensor]:
        """What sets the personal model of ``client`` apart from the pretrained one.

        Copies of all trained parameters that :meth:`personal` computes with, whoever holds them, by their full names in
        the whole model. Adapters among them may have any rank; their scaling is alpha / rank of
        ``world.config.model.lora``.
        """
        ...

    def account(self, client: str) -> Account:
        """What ``client`` has spent."""
        ...

    def server_facts(self) -> dict[str, float]:
        """``parameters``, ``updates`` and ``compute_seconds`` of the server; zeros without one."""
        ...

    def state(self) -> State:
        """Everything that :meth:`load` needs to go on bit for bit."""
        ...

    def load(self, state: State) -> None:
        """Go on from :meth:`state`."""
        ...

    def close(self) -> None:
        """Let go of links."""
        ...
