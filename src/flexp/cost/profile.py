"""What a device has: memory, speed and network, as a small JSON file that can be carried elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from flexp.config import DeviceClassConfig, Rate, Section
from flexp.cost import classes as profiles
from flexp.errors import ConfigError
from flexp.files import read_json, write_json

VERSION = 1
"""Of the file's form; another one is refused."""

WATTS: dict[str, float] = {
    "phone": 4.0,
    "raspberry-pi": 8.0,
    "jetson": 15.0,
    "laptop": 30.0,
    "workstation": 400.0,
    "server": 500.0,
}
"""Assumptions: what a device of a class draws while it trains. They make the energy a proxy, not a measurement."""

Seconds = Annotated[float, Field(ge=0.0)]
Role = Literal["client", "server"]


class PieceSeconds(Section):
    """Seconds of one piece of the model (a block, the embeddings, the head with its loss), and its operations."""

    forward: Seconds
    backward: Seconds
    forward_flops: Seconds = 0.0
    backward_flops: Seconds = 0.0


class ShapeSeconds(Section):
    """What a step's pieces took with ``examples`` examples of the model's measured length."""

    examples: PositiveInt
    embed: PieceSeconds
    blocks: list[PieceSeconds]  # all L, whether measured or of a measured one's kind
    head: PieceSeconds


class ModelSeconds(Section):
    """Measured on one model's own blocks.

    Attributes:
        model: the fingerprint of its configuration (:func:`flexp.models.fingerprint.fingerprint`).
        rank: of the adapters; ``None``: full tuning.
        shapes: one or two batch sizes; between and beyond them seconds are taken to be linear in the examples.
        update: seconds of the optimiser for each trained parameter.
        overhead_bytes: peak memory that is no tensor (code, libraries' buffers), above the bare interpreter.
    """

    model: str
    name: str = ""
    kind: str
    dtype: str
    autocast: str = "off"
    rank: PositiveInt | None = None
    length: PositiveInt
    shapes: Annotated[list[ShapeSeconds], Field(min_length=1)]
    update: Seconds = 0.0
    overhead_bytes: Annotated[int, Field(ge=0)] | None = None


class Profile(Section):
    """A device, or the server.

    Attributes:
        memory_bytes: what training may use, above the bare interpreter; swap does not count.
        memory_from: which limit that is.
        flops: floating-point operations a second that training sustains; for models that were not measured.
        uplink_bps: bits a second to the server (or, of a server, to the network); ``downlink_bps`` from it.
        latency_s: of a message, one way.
        measured: what was measured, and on which model; empty for a ready class.
        watts: drawn while computing, ``link_watts`` while transmitting: assumptions.
    """

    version: Literal[1] = 1
    name: str
    role: Role = "client"
    memory_bytes: PositiveInt
    memory_from: str = ""
    cores: PositiveInt = 1
    threads: PositiveInt = 1
    flops: Rate
    uplink_bps: Rate
    downlink_bps: Rate
    latency_s: Annotated[float, Field(ge=0.0)]
    link_from: str = ""
    measured: list[ModelSeconds] = Field(default=[])
    watts: Rate = 10.0
    link_watts: Rate = 1.0

    @model_validator(mode="after")
    def _batch_sizes_differ(self) -> Profile:
        for item in self.measured:
            if len({shape.examples for shape in item.shapes}) != len(item.shapes):
                raise ValueError("measured: every shape must have another number of examples")
            if len({len(shape.blocks) for shape in item.shapes}) != 1:
                raise ValueError("measured: every shape must have all blocks of the model")
        return self

    @classmethod
    def from_class(
        cls, name: str, classes: Mapping[str, DeviceClassConfig] | None = None, role: Role | None = None
    ) -> Profile:
        """The device class ``name`` of :mod:`flexp.cost.classes`, which the virtual clock knows as well.

        Raises:
            ConfigError: there is no such class.
        """
        device = profiles.profile(name, classes)
        return cls(
            name=device.name,
            role=role or ("server" if name == "server" else "client"),
            memory_bytes=device.memory_bytes,
            memory_from="device class",
            flops=device.flops,
            uplink_bps=device.uplink_bps,
            downlink_bps=device.downlink_bps,
            latency_s=device.latency_s,
            link_from="device class",
            watts=WATTS.get(name, 10.0),
        )

    def as_class(self) -> profiles.DeviceProfile:
        """The same device for the virtual clock."""
        return profiles.DeviceProfile(
            name=self.name,
            memory_bytes=self.memory_bytes,
            flops=self.flops,
            uplink_bps=self.uplink_bps,
            downlink_bps=self.downlink_bps,
            latency_s=self.latency_s,
        )

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Read what :meth:`write` wrote.

        Raises:
            StorageError: the file is missing or no JSON.
            ConfigError: it is no profile, or one of another version.
        """
        return cls.parse(read_json(path), str(path))

    @classmethod
    def parse(cls, content: Any, where: str) -> Profile:
        """A profile from JSON's values; ``where`` they stand is told in errors.

        Raises:
            ConfigError: they are no profile, or one of another version.
        """
        found = content.get("version") if isinstance(content, dict) else None
        if found != VERSION:
            raise ConfigError(
                f"{where}: version {found!r} of a device profile is not known, expected {VERSION}; "
                "make it anew with `flexp profile`"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "profile"
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where}: {key}: {reason}; make it anew with `flexp profile`") from error

    def write(self, path: Path) -> None:
        """Save as JSON; written beside and renamed.

        Raises:
            StorageError: the place cannot be written.
        """
        write_json(path, self.model_dump(mode="json"))
