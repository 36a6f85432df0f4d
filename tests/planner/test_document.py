"""A plan's words, JSON, page and front."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from flexp.errors import ConfigError
from flexp.files import write_json
from flexp.planner.accuracy import AccuracyCurve, CurvePoint
from flexp.planner.document import Reasons, document, holding, read_plan
from flexp.planner.pareto import front
from flexp.planner.plan import make_plan
from flexp.report.planning import alike, render

from .fakes import BLOCKS, MB, FakeCosts, fleet

DEEP_IS_BETTER = AccuracyCurve(
    source="pilots",
    note="made up",
    points=[CurvePoint(share=0.0, loss=0.2, low=0.2, high=0.2), CurvePoint(share=1.0, loss=0.0, low=0.0, high=0.0)],
)
MIXED = [
    {"name": "phone", "class": "phone", "count": 2, "memory_bytes": 110 * MB},
    {"name": "pi", "class": "raspberry-pi"},
    {"name": "gpu", "class": "workstation"},
]


def test_what_a_client_holds_in_words() -> None:
    assert holding((1, 6), 6) == "embeddings, block 0, head (1 of 6 blocks)"
    assert holding((3, 4), 6) == "embeddings, blocks 0–2, blocks 4–5, head (5 of 6 blocks)"
    assert holding((0, 5), 6) == "embeddings, block 5, head (1 of 6 blocks)"


def test_why_not_deeper_or_shallower() -> None:
    plan = make_plan(fleet(MIXED, choices={"tails": [0], "micro_batches": [8]}), FakeCosts(), DEEP_IS_BETTER)
    reasons = Reasons(plan)
    assert plan.choice("phone-1").cut == (1, 4)  # s = 2 is 20 + 80 + 8 MB with checkpointing, and 15 % more
    assert reasons.of("phone-1") == {
        "deeper": "1 block more would need 108 MB and 15 % to spare, of its 110 MB",
        "shallower": "nothing shallower may be chosen: the embeddings stay on the device",
    }
    assert plan.choice("gpu").cut == (3, 4)
    assert reasons.of("gpu")["deeper"] == "the server keeps one block at least"
    assert "points of accuracy (pilots)" in reasons.of("gpu")["shallower"]
    # With s = 1, 8 · 1 / 30 s on the device, 0.24 s on the server and 0.02 s of latency; with s = 2, 0.71 s.
    with_deadline = [{**MIXED[1], "deadline_s": 0.6, "uplink_bps": 1e12}]
    timed = make_plan(fleet(with_deadline, choices={"tails": [0]}), FakeCosts(), DEEP_IS_BETTER)
    assert Reasons(timed).of("pi")["deeper"] == "1 block more would take 0.71 s, later than its deadline of 0.6 s"


def test_no_single_change_of_a_cut_is_better() -> None:
    """What the words rest on: at the optimum every other option of one client is worth no less."""
    plan = make_plan(fleet(MIXED), FakeCosts(server_flops=20e9))
    reasons = Reasons(plan)
    for group, kind in enumerate(plan.setting.kinds):
        own = plan.solution.options[kind.names[0]]
        for option in plan.setting.problem.groups[group].options:
            after, allowed = reasons._swapped(group, own, option)
            assert not allowed or after.objective >= plan.measures.objective - 1e-9


def test_the_document_is_read_back_and_says_it_all(tmp_path: Path) -> None:
    made = FakeCosts()
    plan = make_plan(fleet(MIXED), made)
    content = document(plan, front(plan, 4))
    write_json(tmp_path / "plan.json", content)
    saved = read_plan(tmp_path / "plan.json")
    assert (saved.model, saved.blocks) == ("fake", BLOCKS)
    for client in saved.clients:
        choice = plan.choice(client.name)
        assert asdict(choice) == client.model_dump(exclude={"name"})
    each = [(one["name"], one["cut"]) for one in content["settings"]["data.clients.each"]]
    assert each == [(client.name, list(plan.choice(client.name).cut)) for client in saved.clients]
    assert content["totals"]["objective"] == plan.measures.objective
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["accuracy"]["source"] == "prior"
    page = render(content)
    for words in ("phone-1 +1", "a prior, not a measurement", "Content-Security-Policy", "Not deeper"):
        assert words in page
    assert [row["names"] for row in alike(content)] == [["phone-1", "phone-2"], ["pi"], ["gpu"]]
    script = "<script>alert(1)</script>"
    content["fleet"] = content["clients"][0]["name"] = content["model"] = script
    assert script not in render(content)
    (tmp_path / "plan.json").write_text('{"version": 2}', encoding="utf-8")
    with pytest.raises(ConfigError, match="expected what flexp plan --out wrote"):
        read_plan(tmp_path / "plan.json")


def test_the_front_holds_every_efficient_end() -> None:
    devices = [{**device, "uplink_bps": 1e9} for device in MIXED]
    choices = {"codecs": ["none", "int4"]}
    plan = make_plan(fleet(devices, choices=choices), FakeCosts(server_flops=10e9), DEEP_IS_BETTER)
    points = front(plan, 5)
    values = [point.values() for point in points]
    assert len(values) > 3
    assert values == sorted(values)  # by time
    for one in values:
        for other in values:
            assert one is other or not all(a <= b for a, b in zip(other, one, strict=True))
    options = [option for kind in plan.setting.problem.groups for option in kind.options]
    least = sum(
        len(group.clients) * min(option.loss for option in group.options) for group in plan.setting.problem.groups
    )
    assert min(loss for _, loss, _ in values) == pytest.approx(least / 4)
    assert min(size for *_, size in values) == pytest.approx(min(option.bytes for option in options))
