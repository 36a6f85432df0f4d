"""What a method is: it trains every client's personal model, round by round, and can be saved and scored.

A method is one class in a file of this folder, or in another package (:mod:`flexp.registry`). Its class attributes and
class methods tell everything that other rooms need to know of it: its settings, what a client holds, who waits for
whom, where it cuts, what is tuned. No other file names it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from flexp.client.meeting import Meets
from flexp.client.personal_head import Choice
from flexp.client.trainer import Step
from flexp.config import AlignConfig, LoraConfig, RunConfig, Section, all_keys
from flexp.cost.clock import Schedule
from flexp.data.types import ClientData, Federation
from flexp.errors import ConfigError
from flexp.links.base import Traffic
from flexp.models.stage import Stage
from flexp.registry import METHODS

Forward = Callable[[Mapping[str, Tensor]], Any]
OnStep = Callable[[Step], None]
State = dict[str, dict[str, Tensor]]
"""Party → flat named tensors. ``server`` is the server; every other party is a client."""
Cuts = dict[str, tuple[int, int]]
"""(s, e) by client."""
Axis = tuple[str, Sequence[Any] | Callable[[RunConfig], list[Any]]]
"""A key of the configuration and the values that are tried, the default first."""

RATIO = "shared/personal"
"""As the key of an axis: the shared learning rate as a multiple of the personal one."""


@dataclass(frozen=True)
class Holds:
    """What a client holds at its peak, while a step's backward is under way.

    Everybody has the part's weights, a step's activations and gradients, and one optimiser state over what is trained.
    Copies that are only on their way (a download, an upload) are not counted, nor is moving what rests to flash.

    Attributes:
        part: ``whole``: all of the model. ``ends``: embeddings, blocks [0, s) and [e, L), norm and head. ``start``:
            embeddings and blocks [0, s), the rest being the server's. ``None``: no client trains.
        weights: further copies of what it trains.
        optimizers: further optimiser states over it.
    """

    part: Literal["whole", "ends", "start"] | None
    weights: int = 0
    optimizers: int = 0


@dataclass(frozen=True)
class Deployed:
    """How a method runs on a network.

    Attributes:
        averages: after each round clients average what they train, in sums over the server.
        middle: the server has the blocks between a client's ends; else a client has all of the model.
    """

    averages: bool = False
    middle: bool = True

    @property
    def idle(self) -> tuple[str, ...]:
        """How keys begin that mean nothing there. Bounds of a server that are never reached are none of these."""
        shared = ("update", "mean_over", "trim", "noise", "memory", "joined", "tuning", "adapters", "quantization")
        bounds = ("max_norm", "clip", "similar", "explode", "median_over", "settle")
        here = ("model.base_depth", "link.", "privacy.", "server.device", *(f"server.{key}" for key in shared))
        return () if self.middle else (*here, *(f"server.guard.{key}" for key in bounds))


@dataclass(frozen=True)
class Adapters:
    """``lora``: of most blocks. ``beside``: ranks of the blocks in which they are lower, by the blocks' indices."""

    lora: LoraConfig
    beside: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """What every method starts from.

    Attributes:
        source: the whole pretrained model, frozen. All parties are carved out of it and share its tensors.
        cuts: (s, e) of each client, by name, as the method uses them (:meth:`Method.cuts`).
        absent: clients whose device cannot hold what the method trains there. They take no part in training and are
            scored with what they have all the same: the average, where there is one, else the pretrained model.
        plan: what the cuts were planned by (``plan.json``), where they were not written down.
    """

    config: RunConfig
    federation: Federation
    source: Stage
    cuts: Cuts
    absent: frozenset[str] = frozenset()
    plan: Mapping[str, Any] | None = None

    @property
    def method(self) -> type[Method]:
        """The method of the configuration."""
        return method_of(self.config)

    def adapters(self, client: str) -> Adapters:
        """What ``client``'s device holds of the adapters; a simulation may keep it padded to a larger rank."""
        model = self.config.model
        return self.method.adapters(self, client) if model.tuning == "lora" else Adapters(model.lora)

    @property
    def meets(self) -> Meets:
        """Which meetings the run has: those that the settings ask for, where method and task know any."""
        return self.method.meetings(self.config) if self.method.meets else Meets(False, False)

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


class Method(ABC):
    """A way to give every client its own model.

    The docstring's first line describes the method in ``flexp methods``.

    Attributes:
        name: in the configuration.
        table: ``[method.TABLE]`` has its own settings; the name with ``_`` for ``-`` unless the class says otherwise.
        Config: its own settings; ``None``: it has none.
        same_for_all: the personal model is one and the same for all, so everybody's test data are scored once.
        sends: what leaves a client in training, for people.
        held: what a client holds; :meth:`holds` where that depends on the settings.
        timing: who waits for whom on the virtual clock; :meth:`schedule` where that depends on the settings. ``None``:
            no client computes.
        axis: its own key setting and the two values that are tried in tuning, the default first, if it has one.
        tuned: ``False``: nothing is trained, so there is nothing to tune.
        effort: how long it takes beside the others, roughly.
        aligns: ``method.align`` holds for its clients.
        meets: its clients can meet in a classifier in closed form (``model.head``, ``method.meet``).
        guards: its clients' heads stay with them, so they can be taught to tell less (``privacy``).
        recuts: it moves cuts while it trains.
        deployed: how it runs on a network; ``None``: in simulations alone.
        world: what it was made from, with the settings that it uses itself.
    """

    name: ClassVar[str]
    table: ClassVar[str]
    Config: ClassVar[type[Section] | None] = None
    same_for_all: ClassVar[bool] = False
    sends: ClassVar[str] = "nothing"
    held: ClassVar[Holds] = Holds("whole")
    timing: ClassVar[Schedule | None] = Schedule("alone")
    axis: ClassVar[Axis | None] = None
    tuned: ClassVar[bool] = True
    effort: ClassVar[float] = 1.0
    aligns: ClassVar[bool] = False
    meets: ClassVar[bool] = False
    recuts: ClassVar[bool] = False
    deployed: ClassVar[Deployed | None] = None
    guards: ClassVar[bool] = False

    world: World

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and "table" not in vars(cls):
            cls.table = cls.name.replace("-", "_")

    def __init__(self, world: World) -> None:
        self.world = world
        self.rare = 0  # classes that the last meeting left out (:class:`flexp.client.meeting.Seat`)

    @classmethod
    def own(cls, config: RunConfig) -> Any:
        """Its own settings, an instance of its ``Config``."""
        assert cls.Config is not None
        return config.method.own(cls.table, cls.Config)

    @classmethod
    def holds(cls, config: RunConfig) -> Holds:
        """What a client holds with the settings of ``config``."""
        return cls.held

    @classmethod
    def schedule(cls, config: RunConfig) -> Schedule | None:
        """Who waits for whom with the settings of ``config``."""
        return cls.timing

    @classmethod
    def suits(cls, config: RunConfig) -> bool:
        """Whether it has something to do there; a comparison that names no methods leaves out who has not."""
        return True

    @classmethod
    def meetings(cls, config: RunConfig) -> Meets:
        """The meetings that a run with these settings has, if the method knows any."""
        return Meets.of(config)

    @classmethod
    def cuts(cls, config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> Cuts:
        """(s, e) of each client where the method really cuts; applied once more, it changes nothing.

        A :class:`World` holds these cuts, so that memory, operations and the summary are about what runs.

        Args:
            cuts: what the configuration says.
            blocks: of the model.

        Raises:
            ConfigError: the method's own cut does not fit the model, or would send bare embeddings unasked.
        """
        return dict(cuts)

    @classmethod
    def adapters(cls, world: World, client: str) -> Adapters:
        """What ``client``'s device holds where adapters are trained."""
        return Adapters(world.config.model.lora)

    @property
    def phases(self) -> Sequence[tuple[Collection[str] | None, float]]:
        """A client's steps by what they train, some weights or ``None`` for all, with their shares of all steps."""
        return [(None, 1.0)]

    @abstractmethod
    def train_round(self, number: int, on_step: OnStep) -> None:
        """Let every client have its turn of ``train.steps_per_round`` steps. Rounds count from 1."""

    def meet(self, meeting: int) -> dict[str, Choice]:
        """Let the participants meet, before the first step or after the last (:mod:`flexp.client.meeting`); gives what
        the classifier of each is made of from then on. Only where :attr:`meets`."""
        raise NotImplementedError

    @abstractmethod
    def personal(self, client: str) -> Forward:
        """The personal model of ``client``, for evaluation: takes a batch, gives an output with ``logits``."""

    @abstractmethod
    def trained_weights(self, client: str) -> dict[str, Tensor]:
        """What sets the personal model of ``client`` apart from the pretrained one.

        Copies of all trained parameters that :meth:`personal` computes with, whoever holds them, by their full names in
        the whole model. Adapters among them may have any rank; their scaling is alpha / rank of
        ``world.config.model.lora``.
        """

    @abstractmethod
    def account(self, client: str) -> Account:
        """What ``client`` has spent."""

    def server_facts(self) -> dict[str, float]:
        """``parameters``, ``trained_parameters``, ``updates`` and ``compute_seconds`` of the server."""
        return {"parameters": 0, "trained_parameters": 0, "updates": 0, "compute_seconds": 0.0}

    @abstractmethod
    def state(self) -> State:
        """Everything that :meth:`load` needs to go on bit for bit."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Go on from :meth:`state`."""

    def close(self) -> None:  # noqa: B027
        """Let go of links."""


def method_of(config: RunConfig) -> type[Method]:
    """The class of the method that ``config`` names.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    method: type[Method] = METHODS[config.method.name]
    return method


def deployed(config: RunConfig) -> Deployed:
    """How the configuration's method runs on a network.

    Raises:
        ConfigError: it does not, or not with early stopping; or something is set that means nothing there.
    """
    found = method_of(config).deployed
    if found is None:
        known = ", ".join(name for name in METHODS if METHODS[name].deployed is not None)
        raise ConfigError(
            f"method.name = {config.method.name!r} is for simulations (flexp run); on a network there are {known}"
        )
    if found.averages and config.train.early_stopping.patience is not None:
        raise ConfigError(f"train.early_stopping: clients of {config.method.name!r} are averaged until the last round; "
                          "leave it out")  # fmt: skip
    for key in all_keys(RunConfig):
        if key.startswith(found.idle) and _is_set(config, key):
            raise ConfigError(f"{key} means nothing to clients of {config.method.name!r} on a network, which have all "
                              "of the model; leave it out")  # fmt: skip
    return found


def _is_set(section: Section, key: str) -> bool:
    """Whether a key has another value than its default."""
    name, _, rest = key.partition(".")
    value = getattr(section, name)
    return _is_set(value, rest) if rest else bool(value != type(section).model_fields[name].default)


def as_deployed(config: RunConfig, cuts: Cuts, blocks: int) -> tuple[RunConfig, Cuts]:
    """The settings that clients have on a network, and where they cut: (L, L) where they have all of the model.

    Raises:
        ConfigError: the method is for simulations.
    """
    how = deployed(config)
    if not how.averages:
        return config, cuts
    cuts = method_of(config).cuts(config, cuts, blocks) if how.middle else dict.fromkeys(cuts, (blocks, blocks))
    return without_alignment(config), cuts


def without_alignment(config: RunConfig) -> RunConfig:
    """The same without alignment, so that the server's blocks begin at the smallest cut."""
    method = config.method.model_copy(update={"align": AlignConfig(kind="off")})
    return config.model_copy(update={"method": method, "model": config.model.model_copy(update={"base_depth": None})})


def base_depth(config: RunConfig, cuts: Mapping[str, tuple[int, int]]) -> int:
    """s_min of a server that clients align with: as configured, else the smallest s, or 1 where cuts may move."""
    if config.model.base_depth is not None:
        return config.model.base_depth
    return 1 if config.recut.on else min(start for start, _ in cuts.values())


def of_a_round(*shares: float) -> Callable[[RunConfig], list[int]]:
    """As the values of an axis: so many of a round's steps."""
    return lambda config: [max(1, math.ceil(config.train.steps_per_round * share)) for share in shares]
