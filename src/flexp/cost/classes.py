"""Device classes: how much memory training may use, how fast a device computes, and how it is connected.

The figures are orders of magnitude for a class, not measurements of one device: whoever knows better says so in
``[devices.classes.NAME]``. Peaks are public; what share of a peak training sustains is this project's assumption and is
marked so, and so is the share of the memory. Peaks are those of single precision, in which FlexP trains by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field, PositiveInt, ValidationError, model_validator

from flexp.config import DeviceClassConfig, DevicesConfig, Rate, Section
from flexp.errors import ConfigError


class DeviceProfile(Section):
    """One device, or the server.

    Attributes:
        memory_bytes: what training may use, above the bare interpreter.
        flops: floating-point operations a second that training sustains.
        uplink_bps: bits a second to the network; ``downlink_bps`` from it.
        latency_s: of a message between the device and the network, one way.
        mean_on_s: availability: exponential periods of this mean in which the device is there, and of ``mean_off_s`` in
            which it is away. Both ``None``: always there.
    """

    name: str
    memory_bytes: PositiveInt
    flops: Rate
    uplink_bps: Rate
    downlink_bps: Rate
    latency_s: float = Field(ge=0.0)
    mean_on_s: Rate | None = None
    mean_off_s: Rate | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> DeviceProfile:
        if (self.mean_on_s is None) != (self.mean_off_s is None):
            raise ValueError("mean_on_s and mean_off_s belong together: set both, or none for a device always there")
        return self

    @property
    def always_on(self) -> bool:
        return self.mean_off_s is None


GIB = 2**30

# Networks. Mobile and fixed broadband: global means of the Speedtest Global Index (Ookla) of September 2020, mobile
# 35.96 Mbit/s down and 11.22 up, fixed 85.73 down and 45.74 up; latencies are Ookla's global figures of November 2022,
# 28 ms mobile and 10 ms fixed, there and back, so half of it one way. Both as the press reported them: docs/devices.md.
_MOBILE = {"uplink_bps": 11.22e6, "downlink_bps": 35.96e6, "latency_s": 0.014}
_FIXED = {"uplink_bps": 45.74e6, "downlink_bps": 85.73e6, "latency_s": 0.005}

READY: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        DeviceProfile(
            name="phone",
            # Assumption: an eighth of 8 GB, so that nothing that its owner uses is thrown out.
            memory_bytes=1 * GIB,
            # Snapdragon 8 Gen 2: one Cortex-X3 at 3.2 GHz and four A715/A710 at 2.8 GHz (notebookcheck.net). With four
            # and two 128-bit units for fused multiply-adds each, that is a peak of 102 + 4 · 45 = 282 GFLOP/s.
            # Assumption: a tenth of it, since a phone that trains in somebody's pocket must stay cool.
            flops=28e9,
            **_MOBILE,
        ),
        DeviceProfile(
            name="raspberry-pi",
            memory_bytes=3 * GIB,  # Raspberry Pi 5 with 4 GB. Assumption: the system takes a quarter.
            # Four Cortex-A76 at 2.4 GHz: HPL measures 30.2 GFLOP/s in double precision (geerlingguy/top500-benchmark,
            # issue 18). Assumption: in single precision, twice as fast, training sustains half of what HPL would.
            flops=30e9,
            **_FIXED,
        ),
        DeviceProfile(
            name="jetson",
            memory_bytes=6 * GIB,  # Jetson Orin Nano with 8 GB, shared with the system. Assumption: it takes a quarter.
            # 1024 CUDA cores at 625 MHz, two operations each a cycle (NVIDIA's data sheet): 1.28 TFLOP/s. Assumption:
            # 30 %, in the range of what large models sustain in training (PaLM, arXiv 2204.02311, lists 21 to 46 %).
            flops=0.38e12,
            **_FIXED,
        ),
        DeviceProfile(
            name="laptop",
            memory_bytes=8 * GIB,  # Assumption: half of 16 GB.
            # Assumption: eight cores at 3 GHz with two 256-bit units for fused multiply-adds, which is a peak of 768
            # GFLOP/s; and 20 % of it.
            flops=150e9,
            **_FIXED,
        ),
        DeviceProfile(
            name="workstation",
            memory_bytes=22 * GIB,  # GeForce RTX 4090: 24 GB. Assumption: the display and the driver take two.
            flops=25e12,  # NVIDIA's figure for single precision is 82.6 TFLOP/s. Assumption: 30 %, as above.
            **_FIXED,
        ),
        DeviceProfile(
            name="server",
            memory_bytes=76 * GIB,  # A100 with 80 GB. Assumption: the driver takes a few.
            flops=60e12,  # A100 data sheet: 156 TFLOP/s dense in TF32. Assumption: 40 %, as well-tuned training has.
            uplink_bps=10e9,  # Assumption: a data centre's link that no client fills.
            downlink_bps=10e9,
            latency_s=0.0,  # the clients' latencies reach to their server already
        ),
    )
}


def profile(name: str, classes: Mapping[str, DeviceClassConfig] | None = None) -> DeviceProfile:
    """The class ``name``: a ready one, one of the user's own ``classes``, or a ready one with some of its figures.

    Raises:
        ConfigError: there is no such class, or figures are missing.
    """
    own = (classes or {}).get(name)
    base_name = name if own is None or own.base is None else own.base
    base = READY.get(base_name)
    if own is None or (base is None and own.base is not None):
        if base is None:
            known = ", ".join([*READY, *(other for other in classes or {} if other not in READY)])
            raise ConfigError(f"device class {base_name!r} is not known; expected one of {known}")
        return base
    figures = {} if base is None else base.model_dump()
    figures |= {key: value for key, value in own.model_dump(exclude={"base"}).items() if value is not None}
    needed = [key for key, field in DeviceProfile.model_fields.items() if field.is_required() and key != "name"]
    missing = [key for key in needed if key not in figures]
    if missing:
        raise ConfigError(
            f"devices.classes.{name} lacks {', '.join(missing)}; set all of them, or a ready class as its base"
        )
    try:
        return DeviceProfile(**{**figures, "name": name})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"devices.classes.{name}: {reason}") from error


def assign(config: DevicesConfig, clients: Sequence[str]) -> dict[str, DeviceProfile]:
    """The device of each client: ``devices.assign`` in order, repeated when there are more clients.

    Raises:
        ConfigError: a class is not known.
    """
    names = config.assign
    return {client: profile(names[i % len(names)], config.classes) for i, client in enumerate(clients)}
