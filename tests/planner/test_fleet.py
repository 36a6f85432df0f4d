"""What a fleet.toml may say, and what it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexp.cost.profile import Profile
from flexp.errors import ConfigError
from flexp.planner.fleet import MARGIN, TaskShape, parse_fleet
from flexp.planner.options import grid
from flexp.run.planned import load_fleet

from .fakes import fleet


def test_classes_profiles_and_what_is_otherwise(tmp_path: Path) -> None:
    own = Profile.from_class("jetson").model_copy(update={"flops": 7e9})
    own.write(tmp_path / "mine.json")
    (tmp_path / "fleet.toml").write_text(
        """
        name = "ours"
        [task]
        length = 32
        [[devices]]
        name = "phone"
        class = "old"
        count = 2
        deadline_s = 3.0
        [[devices]]
        name = "bench"
        profile = "mine.json"
        latency_s = 0.5
        [server]
        class = "workstation"
        slots = 2
        [classes.old]
        base = "phone"
        memory_bytes = 1000
        """,
        encoding="utf-8",
    )
    found = load_fleet(tmp_path / "fleet.toml", ["task.length=64", "weights.round=0"])
    assert [device.name for device in found.devices] == ["phone-1", "phone-2", "bench"]
    assert [device.deadline_s for device in found.devices] == [3.0, 3.0, None]
    assert [device.profile.memory_bytes for device in found.devices[:2]] == [1000, 1000]
    assert found.devices[0].usable_bytes == int(1000 / (1 + MARGIN))
    assert (found.devices[2].profile.flops, found.devices[2].profile.latency_s) == (7e9, 0.5)
    assert (found.slots, found.server.memory_bytes) == (2, Profile.from_class("workstation").memory_bytes)
    assert (found.task.length, found.weights.round, found.weights.time) == (64, 0.0, 0.25)
    one, two, three = found.devices
    assert one.kind == two.kind != three.kind


PHONE = [{"name": "a", "class": "phone"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"devices": []}, "devices: List should have at least 1 item"),
        ({"devices": [{"name": "a"}]}, "expected either class = NAME or profile = FILE"),
        ({"devices": [{"name": "a", "profile": "p.json", "flops": 1e9}]}, "flops: the profile has measured seconds"),
        ({"devices": [{"name": "a", "class": "mainframe"}]}, "device class 'mainframe' is not known"),
        ({"devices": [{"name": "a", "class": "phone"}] * 2}, "two devices are called a"),
        ({"devices": [{"name": "a", "class": "phone", "memory": 1}]}, "unknown key devices.0.memory"),
        ({"devices": [{"name": "a", "class": "phone"}], "choices": {"codecs": ["zip"]}}, "'zip' is not known"),
        ({"devices": [{"name": "a", "class": "phone"}], "weights": {"round": -1}}, "weights.round"),
        ({"devices": PHONE, "privacy": {"max_content_words": 0.2, "pool": True, "penalty": "nopeek"}}, "choose one"),
        ({"devices": PHONE, "privacy": {"pool": True}}, "set privacy.max_content_words, or leave [privacy] out"),
        ({"devices": PHONE, "privacy": {"max_content_words": 0.2}, "task": {"pools": True}}, "privacy.pool = true"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        parse_fleet(content, "fleet.toml")


def test_the_grid_is_every_admissible_choice() -> None:
    choices = fleet([{"name": "a"}], choices={"tails": [0, 1], "checkpointing": [False]}).choices
    found = grid(choices, 3, TaskShape().batch_size, None)
    assert {choice.cut for choice in found} == {(1, 3), (1, 2), (2, 3)}  # never (2, 2): the server keeps a block
    assert {(choice.micro_batch, choice.accumulation) for choice in found} == {(1, 8), (2, 4), (4, 2), (8, 1)}
    assert len(found) == len(set(found)) == 12
    with pytest.raises(ConfigError, match="nothing can be chosen for a model of 1 blocks"):
        grid(choices, 1, 8, None)
