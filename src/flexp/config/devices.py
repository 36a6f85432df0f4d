"""The tables ``[devices]`` and ``[recut]``: what clients run on, how that changes, and whether cuts follow."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from flexp.config.section import Bytes, Fraction, PositiveInt, Rate, Section


class DeviceClassConfig(Section):
    """A device class of one's own (all figures are needed), or a ready one with some other figures."""

    base: str | None = None  # the ready class whose figures stand where nothing is said; None: that of the same name
    memory_bytes: Bytes | None = None  # what training may use
    flops: Rate | None = None  # floating-point operations a second that training sustains
    uplink_bps: Rate | None = None  # bits a second
    downlink_bps: Rate | None = None
    latency_s: Annotated[float, Field(ge=0.0)] | None = None  # of a message, one way
    mean_on_s: Rate | None = None  # on average a device is there so long, …
    mean_off_s: Rate | None = None  # … and then away so long; None: always there


class DeviceChange(Section):
    """Before a round some clients' devices become those of another class: slower, short of memory, or better."""

    before_round: Annotated[int, Field(ge=2)]
    clients: list[str] | None = None  # None: all
    to: str  # a class


class DevicesConfig(Section):
    """What the device classes of clients are (``data.clients.device``), and the server's.

    With them it is known who can take part in a method, and how long it would take (a virtual clock).
    """

    server: str = "server"  # the class of the server
    server_slots: PositiveInt = 1  # requests that the server works on at once, each at its full speed
    # beside phone, raspberry-pi, jetson, laptop, workstation, server
    classes: dict[str, DeviceClassConfig] = Field(default={})
    changes: list[DeviceChange] = Field(default=[])  # devices that become others while the run goes on


class RecutConfig(Section):
    """Whether cuts are planned again while clients train, as their devices change."""

    on: bool = False
    gain: Fraction = 0.1  # the share of the plan's objective by which another choice must be better
    every: PositiveInt = 5  # flexp client: steps between two looks at its own device …
    patience: PositiveInt = 2  # … and looks in a row that must say the same
    pause: Annotated[int, Field(ge=0)] = 20  # flexp client: steps after a move before the next, unless memory is short
