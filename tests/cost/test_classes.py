"""Device classes: the ready ones, those of one's own, and what is refused."""

from __future__ import annotations

import pytest

from flexp.config import ClientConfig, ClientsConfig, DeviceClassConfig, DevicesConfig
from flexp.cost.profile import READY, Profile, assign
from flexp.errors import ConfigError

FIGURES = {"memory_bytes": 5, "flops": 1.0, "uplink_bps": 2.0, "downlink_bps": 3.0, "latency_s": 0.0}


def test_classes_are_repeated_for_more_clients() -> None:
    clients = ClientsConfig(each=[ClientConfig(device="phone"), ClientConfig(device="laptop")])
    devices = assign(DevicesConfig(), clients.devices(["a", "b", "c"]))
    assert [devices[name].name for name in "abc"] == ["phone", "laptop", "phone"]


def test_ready_classes_are_ordered_as_one_would_expect() -> None:
    order = ["phone", "raspberry-pi", "laptop", "jetson", "workstation", "server"]
    assert set(order) == set(READY)
    speeds = [READY[name].flops for name in order]
    assert speeds == sorted(speeds)
    assert READY["phone"].memory_bytes == min(device.memory_bytes for device in READY.values())
    assert all(device.mean_off_s is None for device in READY.values())


def test_figures_of_a_ready_class_can_be_others() -> None:
    small = Profile.from_class("phone", {"phone": DeviceClassConfig(memory_bytes=7)})
    assert small == Profile.from_class("phone").model_copy(update={"memory_bytes": 7})
    other = Profile.from_class(
        "old", {"old": DeviceClassConfig(base="phone", flops=1.0, mean_on_s=2.0, mean_off_s=3.0)}
    )
    assert (other.name, other.flops, other.uplink_bps) == ("old", 1.0, READY["phone"].uplink_bps)
    assert other.mean_off_s == 3.0


def test_a_class_of_ones_own_needs_all_figures() -> None:
    assert Profile.from_class("mine", {"mine": DeviceClassConfig(**FIGURES)}).memory_bytes == 5
    with pytest.raises(ConfigError, match=r"devices.classes.mine lacks flops, uplink_bps, downlink_bps, latency_s"):
        Profile.from_class("mine", {"mine": DeviceClassConfig(memory_bytes=5)})


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(ConfigError, match=r"device class 'fone' is not known; expected one of phone, .*, mine"):
        assign(DevicesConfig(classes={"mine": DeviceClassConfig(**FIGURES)}), {"a": "fone"})
    with pytest.raises(ConfigError, match="device class 'fone' is not known"):
        Profile.from_class("mine", {"mine": DeviceClassConfig(base="fone")})


def test_half_of_an_availability_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"devices.classes.phone: mean_on_s and mean_off_s belong together"):
        Profile.from_class("phone", {"phone": DeviceClassConfig(mean_on_s=1.0)})
