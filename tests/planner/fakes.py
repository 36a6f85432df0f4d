"""A made-up model whose costs are simple formulas, devices for it, and every plan of a small fleet one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement, product
from typing import Any

from flexp.cost.choice import Choice, Prediction, codec_share
from flexp.cost.profile import Profile
from flexp.planner.fleet import Fleet, TaskShape, parse_fleet
from flexp.planner.problem import Counts, Problem

MB = 10**6
BLOCKS = 4


class FakeCosts:
    """Blocks of 10 MB and 1 GFLOP an example, activations of 1 MB a block and example."""

    name = "fake"
    fingerprint = "0" * 8
    blocks = BLOCKS
    followed: int | None = None

    def __init__(self, server_flops: float = 100e9) -> None:
        self.server_flops = server_flops
        self.asked = 0

    def predict(self, profile: Profile, choice: Choice) -> Prediction:
        self.asked += 1
        start, stop = choice.cut
        own, examples = start + self.blocks - stop, choice.micro_batch * choice.accumulation
        crossing = round(2 * MB * examples * codec_share(choice.codec))
        client = 1e9 * own * examples * (1.33 if choice.checkpointing else 1.0) / profile.flops
        client += 0.001 * choice.accumulation
        server = 1e9 * (stop - start) * examples / self.server_flops
        link = 8 * crossing / profile.uplink_bps + 4 * choice.accumulation * profile.latency_s
        return Prediction(
            memory_bytes=self.memory(TaskShape(length=128), choice),
            step_seconds=client + server + link,
            client_seconds=client,
            server_seconds=server,
            link_seconds=link,
            energy_joules=profile.watts * client + link,
            bytes_up=crossing,
            bytes_down=crossing,
            server_memory_bytes=MB * (stop - start) * choice.micro_batch,
            host_bytes=10 * MB * own,
        )

    def block_bytes(self, rank: int | None) -> tuple[int, ...]:
        return (40 * MB,) * self.blocks

    def memory(self, task: TaskShape, choice: Choice) -> int:
        own = choice.cut[0] + self.blocks - choice.cut[1]
        weights = 10 * MB * own * (1 if choice.rank else 4) // (2 if task.dtype == "bfloat16" else 1)
        kept = MB * choice.micro_batch * (1 if choice.checkpointing else own) * task.length // 128
        return 20 * MB + weights + kept


def fleet(devices: list[dict[str, Any]], **tables: Any) -> Fleet:
    """A fleet as if read; a device without a class is a laptop."""
    entries = [{"class": "laptop", **device} for device in devices]
    return parse_fleet({"name": "made up", "devices": entries, **tables}, "fleet.toml")


def every_plan(problem: Problem) -> Iterator[Counts]:
    """All ways to give every client an option, clients of a group being interchangeable."""
    ways = []
    for group in problem.groups:
        own = []
        for taken in combinations_with_replacement(range(len(group.options)), len(group.clients)):
            own.append({index: taken.count(index) for index in set(taken)})
        ways.append(own)
    yield from product(*ways)


def best_by_hand(problem: Problem) -> float | None:
    """The least objective of all plans that are allowed."""
    return min(
        (problem.measure(counts).objective for counts in every_plan(problem) if problem.allows(counts)), default=None
    )
