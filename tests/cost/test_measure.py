"""Measuring: seconds of every piece, how they are scaled, and a network whose time is made up."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from flexp.cost.choice import Choice
from flexp.cost.link import measure_link
from flexp.cost.measure import flops_per_second, measure_model
from flexp.cost.profile import ShapeSeconds
from flexp.cost.speed import at_size, fitting, scaled
from flexp.links.asking import PullReply
from flexp.links.base import Meter, finished
from flexp.links.messages import ForwardReply, ForwardRequest, Join, Welcome
from tests.planner.tools import cost_of, measured, seconds


@pytest.mark.parametrize(("name", "role", "rank"), [("gpt2", "client", 4), ("bert", "server", None)])
def test_every_piece_is_measured(name: str, role: Any, rank: int | None) -> None:
    cost = cost_of(name)
    found = measure_model(cost, role=role, examples=8, rank=rank, memory_too=False, repeats=2)
    assert (found.model, found.rank, found.length, found.overhead_bytes) == (cost.fingerprint, rank, 10, None)
    assert [shape.examples for shape in found.shapes] == [2, 8]
    for shape in found.shapes:
        assert len(shape.blocks) == cost.blocks
        assert all(piece.forward > 0 and piece.backward > 0 for piece in shape.blocks)
        assert shape.blocks[0].forward_flops == cost.at(shape.examples, rank).blocks[0].forward_flops
        assert (shape.head.forward > 0) == (role == "client")
        assert shape.embed.forward > 0
    assert found.update > 0
    assert flops_per_second(found) > 0


def test_blocks_of_different_kinds_are_measured_apart() -> None:
    found = measure_model(cost_of("gemma3"), examples=2, memory_too=False, repeats=2).shapes[0].blocks
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0] != found[1]


def test_seconds_between_and_beyond_sizes() -> None:
    nothing = seconds(0, 0)
    shapes = [ShapeSeconds(examples=n, embed=nothing, blocks=[], head=nothing) for n in (2, 8, 4)]
    pieces = [seconds(3, 30), seconds(13, 90), seconds(5, 50)]
    values = [at_size(shapes, pieces, n) for n in (1, 2, 3, 4, 6, 8, 10)]
    assert [value.forward for value in values] == [2, 3, 4, 5, 9, 13, 17]
    assert values[0].backward == 20
    assert at_size(shapes[:1], pieces[:1], 6).forward == 9  # one size alone: in proportion


def test_other_shapes_are_scaled_by_their_operations() -> None:
    piece = cost_of("bert").at(2).blocks[0]
    half = seconds(3, 8, (piece.forward_flops / 2, piece.backward_flops / 2))
    assert scaled(half, piece) == (6, 16)
    assert scaled(seconds(3, 8), piece) == (3, 8)


def test_the_nearest_measurement_is_taken() -> None:
    cost = cost_of("bert")
    full, four, sixteen = measured(cost), measured(cost, rank=4), measured(cost, rank=16)
    items = [four, full, sixteen]
    assert fitting(items, cost, Choice((1, 4), 1)) is full
    assert fitting(items, cost, Choice((1, 4), 1, rank=8)) is four
    assert fitting(items, cost, Choice((1, 4), 1, rank=32)) is sixteen
    assert fitting([measured(cost, dtype="bfloat16")], cost, Choice((1, 4), 1)) is None


class SlowLink:
    """A server at the end of a line, with a clock of its own that only messages move."""

    client = "profile"

    def __init__(self, up: float, down: float, latency: float, pulled: int) -> None:
        self.up, self.down, self.latency, self.pulled = up, down, latency, pulled
        self.clock = 0.0
        self.meter = Meter()

    def now(self) -> float:
        return self.clock

    def call(self, request: Any) -> Future[Any]:
        return finished(lambda: self._answer(request))

    def _answer(self, request: Any) -> Any:
        if isinstance(request, Join):
            assert request.cut == (3, 4)
            return Welcome(1, 4, 32)
        if isinstance(request, ForwardRequest):
            size = 8 * request.hidden_BTH.numel() * 4
            self.clock += 2 * self.latency + size / self.up + size / self.down + 0.5
            self.meter.evaluation.server_seconds += 0.5
            return ForwardReply(request.hidden_BTH)
        assert (request.start, request.stop) == (1, 2)
        self.clock += 2 * self.latency + 8 * 4 * self.pulled / self.down
        return PullReply(1, weights={"w": torch.zeros(self.pulled)})


def test_up_down_and_latency_are_told_apart() -> None:
    link = SlowLink(up=1e6, down=8e6, latency=0.02, pulled=50_000)
    found = measure_link(link, cost_of("bert"), now=link.now)  # type: ignore[arg-type]
    assert not found.symmetric
    assert found.latency_s == pytest.approx(0.02, rel=1e-6)
    assert found.uplink_bps == pytest.approx(1e6, rel=1e-6)
    assert found.downlink_bps == pytest.approx(8e6, rel=1e-6)


def test_without_weights_to_pull_both_ways_are_taken_to_be_equal() -> None:
    link = SlowLink(up=2e6, down=2e6, latency=0.01, pulled=10)
    found = measure_link(link, cost_of("bert"), now=link.now)  # type: ignore[arg-type]
    assert found.symmetric
    assert found.uplink_bps == found.downlink_bps == pytest.approx(2e6, rel=1e-6)
    assert found.latency_s == pytest.approx(0.01, rel=1e-6)
