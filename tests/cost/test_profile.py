"""Profiles survive being written and read, and classes become profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexp.config import DeviceClassConfig
from flexp.cost.profile import READY, Profile
from flexp.errors import ConfigError, StorageError
from flexp.files import write_json
from tests.planner.tools import cost_of, measured, plain_profile, seconds


def test_round_trip(tmp_path: Path) -> None:
    profile = plain_profile(measured=[measured(cost_of("bert"), overhead_bytes=7, update=1e-9, rank=4)])
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("name", READY)
def test_every_class_is_a_profile(name: str, tmp_path: Path) -> None:
    profile = Profile.from_class(name)
    assert profile.role == ("server" if name == "server" else "client")
    assert not profile.measured
    ready = {"role": profile.role, "memory_from": "device class", "link_from": "device class"}
    assert profile == READY[name].model_copy(update=ready)
    profile.write(tmp_path / "profile.json")
    assert Profile.read(tmp_path / "profile.json") == profile


def test_a_class_of_ones_own() -> None:
    classes = {"old": DeviceClassConfig(base="phone", flops=5e9)}
    assert Profile.from_class("old", classes).flops == 5e9
    for base in ("phone", "workstation"):
        found = Profile.from_class("mine", {"mine": DeviceClassConfig(base=base)})
        assert (found.watts, found.link_watts) == (READY[base].watts, READY[base].link_watts)
    with pytest.raises(ConfigError, match="'new' is not known"):
        Profile.from_class("new", classes)


def test_what_is_no_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    with pytest.raises(StorageError, match=r"p\.json"):
        Profile.read(path)
    content = plain_profile().model_dump()
    for changes, message in (
        ({"version": 2}, "version 2 of a device profile is not known, expected 1"),
        ({"memory_bytes": 0}, "memory_bytes"),
        ({"colour": "red"}, "colour"),
    ):
        write_json(path, content | changes)
        with pytest.raises(ConfigError, match=message) as caught:
            Profile.read(path)
        assert "flexp profile" in str(caught.value)
        assert "\n" not in str(caught.value)
    write_json(path, [])
    with pytest.raises(ConfigError, match="version None"):
        Profile.read(path)


def test_shapes_of_one_size_are_refused() -> None:
    item = measured(cost_of("bert"))
    twice = item.model_copy(update={"shapes": [item.shapes[0], item.shapes[0]]})
    with pytest.raises(ConfigError, match="another number of examples"):
        Profile.parse(plain_profile().model_dump() | {"measured": [twice.model_dump()]}, "here")
    fewer = item.shapes[1].model_copy(update={"blocks": [seconds(1, 1)]})
    odd = item.model_copy(update={"shapes": [item.shapes[0], fewer]})
    with pytest.raises(ConfigError, match="all blocks"):
        Profile.parse(plain_profile().model_dump() | {"measured": [odd.model_dump()]}, "here")
