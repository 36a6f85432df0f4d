"""What a device has: memory, speed and network; measured (a small JSON file that can be carried elsewhere), or a class.

The figures of device classes are orders of magnitude, not measurements of one device: whoever knows better says so in
``[devices.classes.NAME]``. Peaks are public; what share of a peak training sustains is this project's assumption and is
marked so, and so is the share of the memory. Peaks are those of single precision, in which FlexP trains by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from flexp.config import Bytes, DeviceClassConfig, DevicesConfig, PositiveInt, Rate, Section
from flexp.errors import ConfigError
from flexp.files import read_json, write_json

VERSION = 1
"""Of the file's form; another one is refused."""

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


FIGURES = ("memory_bytes", "flops", "uplink_bps", "downlink_bps", "latency_s")
"""What a device class must have, and a fleet may say otherwise."""


_BESIDE = ("mean_on_s", "mean_off_s", "watts", "link_watts")
"""What a class has from its base besides."""


class Profile(Section):
    """A device, or the server.

    Attributes:
        memory_bytes: what training may use, above the bare interpreter; swap does not count.
        memory_from: which limit that is.
        host_bytes: where that is a GPU's, what the machine's own memory allows besides; ``None``: there is no such.
        flops: floating-point operations a second that training sustains; for models that were not measured.
        uplink_bps: bits a second to the server (or, of a server, to the network); ``downlink_bps`` from it.
        latency_s: of a message, one way.
        measured: what was measured, and on which model; empty for a class.
        watts: drawn while computing, ``link_watts`` while transmitting: assumptions, which make the energy a proxy.
        mean_on_s: availability: exponential periods of this mean in which the device is there, and of ``mean_off_s`` in
            which it is away. Both ``None``: always there.
    """

    version: Literal[1] = 1
    name: str
    role: Role = "client"
    memory_bytes: Bytes
    memory_from: str = ""
    host_bytes: Bytes | None = None
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
    mean_on_s: Rate | None = None
    mean_off_s: Rate | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Profile:
        if (self.mean_on_s is None) != (self.mean_off_s is None):
            raise ValueError("mean_on_s and mean_off_s belong together: set both, or none for a device always there")
        return self

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
        """The class ``name``: a ready one, one of the user's own ``classes``, or a ready one with some of its figures.

        Raises:
            ConfigError: there is no such class, or figures are missing.
        """
        own = (classes or {}).get(name)
        base_name = name if own is None or own.base is None else own.base
        base = READY.get(base_name)
        if base is None and (own is None or own.base is not None):
            known = ", ".join([*READY, *(other for other in classes or {} if other not in READY)])
            raise ConfigError(f"device class {base_name!r} is not known; expected one of {known}")
        figures: dict[str, Any] = {} if base is None else base.model_dump(include={*FIGURES, *_BESIDE})
        if own is not None:
            figures |= own.model_dump(exclude={"base"}, exclude_none=True)
        missing = [key for key in FIGURES if key not in figures]
        if missing:
            raise ConfigError(
                f"devices.classes.{name} lacks {', '.join(missing)}; set all of them, or a ready class as its base"
            )
        try:
            found = cls(name=name, memory_from="device class", link_from="device class", **figures)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"devices.classes.{name}: {reason}") from error
        role = role or ("server" if name == "server" else "client")
        return found.model_copy(update={"role": role})

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
        write_json(path, self.model_dump(mode="json", exclude_none=True))


GIB = 2**30

# Networks. Mobile and fixed broadband: global means of the Speedtest Global Index (Ookla) of September 2020, mobile
# 35.96 Mbit/s down and 11.22 up, fixed 85.73 down and 45.74 up; latencies are Ookla's global figures of November 2022,
# 28 ms mobile and 10 ms fixed, there and back, so half of it one way. Both as the press reported them: docs/devices.md.
_MOBILE: dict[str, Any] = {"uplink_bps": 11.22e6, "downlink_bps": 35.96e6, "latency_s": 0.014}
_FIXED: dict[str, Any] = {"uplink_bps": 45.74e6, "downlink_bps": 85.73e6, "latency_s": 0.005}

READY: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="phone",
            watts=4.0,
            # Assumption: an eighth of 8 GB, so that nothing that its owner uses is thrown out.
            memory_bytes=1 * GIB,
            # Snapdragon 8 Gen 2: one Cortex-X3 at 3.2 GHz and four A715/A710 at 2.8 GHz (notebookcheck.net). With four
            # and two 128-bit units for fused multiply-adds each, that is a peak of 102 + 4 · 45 = 282 GFLOP/s.
            # Assumption: a tenth of it, since a phone that trains in somebody's pocket must stay cool.
            flops=28e9,
            **_MOBILE,
        ),
        Profile(
            name="raspberry-pi",
            watts=8.0,
            memory_bytes=3 * GIB,  # Raspberry Pi 5 with 4 GB. Assumption: the system takes a quarter.
            # Four Cortex-A76 at 2.4 GHz: HPL measures 30.2 GFLOP/s in double precision (geerlingguy/top500-benchmark,
            # issue 18). Assumption: in single precision, twice as fast, training sustains half of what HPL would.
            flops=30e9,
            **_FIXED,
        ),
        Profile(
            name="jetson",
            watts=15.0,
            memory_bytes=6 * GIB,  # Jetson Orin Nano with 8 GB, shared with the system. Assumption: it takes a quarter.
            # 1024 CUDA cores at 625 MHz, two operations each a cycle (NVIDIA's data sheet): 1.28 TFLOP/s. Assumption:
            # 30 %, in the range of what large models sustain in training (PaLM, arXiv 2204.02311, lists 21 to 46 %).
            flops=0.38e12,
            **_FIXED,
        ),
        Profile(
            name="laptop",
            watts=30.0,
            memory_bytes=8 * GIB,  # Assumption: half of 16 GB.
            # Assumption: eight cores at 3 GHz with two 256-bit units for fused multiply-adds, which is a peak of 768
            # GFLOP/s; and 20 % of it.
            flops=150e9,
            **_FIXED,
        ),
        Profile(
            name="workstation",
            watts=400.0,
            memory_bytes=22 * GIB,  # GeForce RTX 4090: 24 GB. Assumption: the display and the driver take two.
            flops=25e12,  # NVIDIA's figure for single precision is 82.6 TFLOP/s. Assumption: 30 %, as above.
            **_FIXED,
        ),
        Profile(
            name="server",
            watts=500.0,
            memory_bytes=76 * GIB,  # A100 with 80 GB. Assumption: the driver takes a few.
            flops=60e12,  # A100 data sheet: 156 TFLOP/s dense in TF32. Assumption: 40 %, as well-tuned training has.
            uplink_bps=10e9,  # Assumption: a data centre's link that no client fills.
            downlink_bps=10e9,
            latency_s=0.0,  # the clients' latencies reach to their server already
        ),
    )
}


def assign(config: DevicesConfig, classes: Mapping[str, str]) -> dict[str, Profile]:
    """The device of each client, of whom ``classes`` has the class.

    Raises:
        ConfigError: a class is not known.
    """
    return {client: Profile.from_class(name, config.classes) for client, name in classes.items()}
