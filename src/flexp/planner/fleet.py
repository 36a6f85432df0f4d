"""What is planned for: a ``fleet.toml`` with devices, their server, what they train, and what counts how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from flexp.config import (
    Bytes,
    ComputeConfig,
    DeviceClassConfig,
    DevicesConfig,
    Fraction,
    LoraConfig,
    ModelConfig,
    PositiveInt,
    PrivacyConfig,
    Quantization,
    Rate,
    Rows,
    Section,
)
from flexp.cost.choice import codec_names
from flexp.cost.profile import FIGURES, Profile
from flexp.errors import ConfigError
from flexp.kinds import ModelKind

Share = Annotated[float, Field(ge=0.0)]

MARGIN = 0.15
"""Predicted memory is within 15 % of what is measured, so that much is left free on devices and server."""


class Weights(Section):
    """What counts how much; every figure but accuracy is divided by its mean over the clients' fastest choices.

    Attributes:
        round: seconds until everybody has made a step: the slowest client, or the server's work for all of them.
        time: seconds of a client's step, mean over clients.
        energy: the energy proxy, bytes: those of both directions; means over clients.
        accuracy: of one percentage point of expected personal accuracy, mean over clients.
    """

    round: Share = 1.0
    time: Share = 0.25
    energy: Share = 0.05
    bytes: Share = 0.1
    accuracy: Share = 0.25


class Choices(Section):
    """What may be chosen; every combination is looked at.

    Attributes:
        starts: of s; ``None``: 1 to L − 1.
        tails: blocks that a client keeps behind the server's, L − e.
        micro_batches: examples of an exchange; those that do not divide the step are left out. ``None``: the step's
            divisors.
        ranks: of LoRA adapters, one for the whole fleet, since the server's adapters have it, too; ``None``: the task's
            own tuning.
    """

    starts: list[Annotated[int, Field(ge=0)]] | None = None
    tails: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(default=[0, 1])
    micro_batches: list[PositiveInt] | None = None
    checkpointing: Annotated[list[bool], Field(min_length=1)] = Field(default=[False, True])
    ranks: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    codecs: Annotated[list[str], Field(min_length=1)] = Field(default=["none"])

    @model_validator(mode="after")
    def _known(self) -> Choices:
        for codec in self.codecs:
            if codec not in codec_names():
                raise ValueError(f"codecs: {codec!r} is not known; expected some of {', '.join(codec_names())}")
        return self


class TaskShape(ComputeConfig):
    """What is trained, as far as it costs.

    Attributes:
        length: tokens of the longest example.
        batch_size: examples of a client's step.
        aligned: whether clients that cut deeper than the shallowest one also send what alignment needs.
        follow: whether these leave the training of the aligned blocks to the server.
        rows: of h, as ``link.rows``.
        read: the share of a text's predicted tokens that have a label, where all have an answer.
        frozen: so many of the first blocks are not trained, nor can a client cut shallower.
        anew: the share of a client's steps in which its examples go up for the first time, with ``link.cache``.
        server_quantization: of the shared blocks, where that is not the clients'.
        own: whether the server holds LoRA adapters for each client by itself (``server.adapters``).
        pools: whether of each text one vector crosses (``privacy.pool``).
    """

    kind: ModelKind = "sequence-classification"
    length: PositiveInt = 128
    labels: PositiveInt = 2
    batch_size: PositiveInt = 8
    rank: PositiveInt = 8
    optimizer: Literal["adamw", "adam", "sgd", "sgd-plain"] = "adamw"
    aligned: bool = False
    follow: bool = False
    rows: Rows = "loss"
    read: Fraction = 1.0
    frozen: Annotated[int, Field(ge=0)] = 0
    anew: Fraction = 1.0
    server_quantization: Quantization | None = None
    own: bool = False
    pools: bool = False

    @property
    def adapters(self) -> int | None:
        """The rank of LoRA adapters; ``None``: there are none."""
        return self.rank if self.tuning == "lora" else None

    @classmethod
    def of_model(cls, model: ModelConfig, **others: Any) -> TaskShape:
        """What ``model`` says of it, and ``others``."""
        return cls(rank=model.lora.rank, **model.computed, **others)

    def model(self, name: str) -> ModelConfig:
        """The model ``name`` as it is trained here."""
        own = self.computed | {"train_embeddings": self.tuning == "full" and self.train_embeddings}
        return ModelConfig(
            id=name, lora=LoraConfig(rank=self.rank), pooling="mean" if self.pools else "checkpoint", **own
        )

    @model_validator(mode="after")
    def _embedded_one_way(self) -> TaskShape:
        if self.embeddings == "file" and self.train_embeddings:
            raise ValueError(
                'embeddings = "file" leaves them as they are, and train_embeddings trains them: choose one'
            )
        if self.quantization != "off" and self.tuning != "lora":
            raise ValueError(f'quantization = "{self.quantization}" is for adapters; set tuning = "lora"')
        if self.blocks == "file" and (self.tuning != "lora" or self.quantization != "off"):
            raise ValueError(
                'blocks = "file" leaves weights as the file has them; set tuning = "lora" and quantization = "off"'
            )
        if self.quantize_ends and self.quantization == "off":
            raise ValueError('quantize_ends needs a quantization; set it to "nf4" or "int8"')
        if self.own and self.tuning != "lora":
            raise ValueError(f'own = true is for adapters, and the tuning is {self.tuning!r}; set tuning = "lora"')
        return self


class Placed(Section):
    """A ready class, one of ``[classes]`` or a profile's file, and what is otherwise here."""

    device_class: str | None = Field(default=None, alias="class")
    profile: str | None = None
    memory_bytes: Bytes | None = None
    flops: Rate | None = None
    uplink_bps: Rate | None = None
    downlink_bps: Rate | None = None
    latency_s: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Placed:
        if (self.device_class is None) == (self.profile is None):
            raise ValueError("expected either class = NAME or profile = FILE")
        if self.profile is not None and self.flops is not None:
            raise ValueError("flops: the profile has measured seconds, which go before it; leave out one of them")
        return self

    def resolve(self, name: str, folder: Path, classes: Mapping[str, DeviceClassConfig]) -> Profile:
        """The profile, called ``name``.

        Raises:
            ConfigError, StorageError: there is no such class or profile.
        """
        if self.profile is not None:
            found = Profile.read(folder / Path(self.profile).expanduser())
        else:
            assert self.device_class is not None
            found = Profile.from_class(self.device_class, classes)
        other = {key: getattr(self, key) for key in FIGURES if getattr(self, key) is not None}
        return found.model_copy(update={**other, "name": name})


class FleetDevice(Placed):
    """One device, or ``count`` equal ones; ``deadline_s``: a step must not take longer."""

    name: str
    count: PositiveInt = 1
    deadline_s: Rate | None = None


class FleetServer(Placed):
    """The server; ``slots``: requests that it works on at once, each at its full speed."""

    slots: PositiveInt = 1


class FleetConfig(Section):
    """A whole ``fleet.toml``."""

    name: str = "fleet"
    margin: Share = MARGIN  # of memory, over what is predicted
    task: TaskShape = TaskShape()
    choices: Choices = Choices()
    weights: Weights = Weights()
    privacy: PrivacyConfig = PrivacyConfig()
    server: FleetServer = FleetServer.model_validate({"class": "server"})
    devices: Annotated[list[FleetDevice], Field(min_length=1)]
    classes: dict[str, DeviceClassConfig] = Field(default={})

    @model_validator(mode="after")
    def _of_texts_alone(self) -> FleetConfig:
        if self.privacy.of_labels or not self.privacy.gradients:
            raise ValueError("privacy: plans keep max_content_words; what hides labels is said in a run's file alone")
        if self.privacy.model_fields_set and self.privacy.max_content_words is None:
            raise ValueError("privacy: a plan needs the bound that it is to keep: set privacy.max_content_words, or "
                             "leave [privacy] out")  # fmt: skip
        if self.task.pools and self.privacy.of_texts and not self.privacy.pool:
            raise ValueError("task.pools = true: with privacy.max_content_words it is planned; set privacy.pool = true "
                             "instead")  # fmt: skip
        if self.privacy.of_texts and self.task.aligned:
            raise ValueError("privacy: alignment sends z_base, which tells texts: set task.aligned = false")
        return self


@dataclass(frozen=True)
class Device:
    """One client's device; ``name`` is the client's, ``margin`` the share over its prediction that must be free."""

    name: str
    profile: Profile
    deadline_s: float | None = None
    margin: float = MARGIN

    @property
    def usable_bytes(self) -> int:
        """The most that may be predicted."""
        return int(self.profile.memory_bytes / (1.0 + self.margin))

    @property
    def usable_host_bytes(self) -> float:
        """The same of the machine that its GPU is in."""
        return math.inf if self.profile.host_bytes is None else self.profile.host_bytes / (1.0 + self.margin)

    @property
    def kind(self) -> tuple[str, float | None]:
        """Equal for devices that need not be told apart."""
        return self.profile.model_copy(update={"name": ""}).model_dump_json(), self.deadline_s


@dataclass(frozen=True)
class Fleet:
    """A fleet whose profiles have been looked up; ``of_run``: from a run's configuration, whose keys are others."""

    name: str
    devices: tuple[Device, ...]
    server: Profile
    slots: int = 1
    task: TaskShape = field(default_factory=TaskShape)
    choices: Choices = field(default_factory=Choices)
    weights: Weights = field(default_factory=Weights)
    margin: float = MARGIN
    of_run: bool = False
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    @property
    def ranks(self) -> list[int | None]:
        """Those that the whole fleet may have; ``None``: full tuning."""
        return [self.task.adapters] if self.choices.ranks is None else [*self.choices.ranks]


def parse_fleet(content: Mapping[str, Any], where: str, folder: Path = Path()) -> Fleet:
    """A fleet from TOML's values; profiles that it names are found in ``folder``.

    Raises:
        ConfigError: a key is unknown or impossible, a name is given twice, a class is not known.
        StorageError: a profile's file is missing.
    """
    try:
        config = FleetConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "fleet"
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown key {key}; docs/planner.md lists the keys of a fleet") from error
        raise ConfigError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}") from error
    devices: list[Device] = []
    for entry in config.devices:
        profile = entry.resolve(entry.device_class or entry.name, folder, config.classes)
        names = [entry.name] if entry.count == 1 else [f"{entry.name}-{number + 1}" for number in range(entry.count)]
        devices += [Device(name, profile, entry.deadline_s, config.margin) for name in names]
    seen: set[str] = set()
    for device in devices:
        if device.name in seen:
            raise ConfigError(f"{where}: two devices are called {device.name}; give each its own name")
        seen.add(device.name)
    server = config.server.resolve("server", folder, config.classes)
    return Fleet(
        config.name,
        tuple(devices),
        server,
        config.server.slots,
        config.task,
        config.choices,
        config.weights,
        config.margin,
        privacy=config.privacy,
    )


def of_run(config: DevicesConfig | None, profiles: Mapping[str, Profile], task: TaskShape, choices: Choices) -> Fleet:
    """The fleet of a run's clients, by name, and of the server of ``[devices]`` (``None``: a usual one).

    Raises:
        ConfigError: a class is not known.
    """
    config = config or DevicesConfig()
    devices = tuple(Device(name, profile) for name, profile in profiles.items())
    server = Profile.from_class(config.server, config.classes, role="server")
    return Fleet("this run", devices, server, config.server_slots, task, choices, of_run=True)
