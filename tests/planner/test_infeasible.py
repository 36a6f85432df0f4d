"""Fleets that cannot be: who lacks what, and the smallest change that would do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexp.cost.choice import Choice
from flexp.errors import ModelError
from flexp.planner.fleet import Fleet, TaskShape
from flexp.planner.infeasible import FLEET, InfeasibleError, _changes
from flexp.planner.options import fits_memory, options_of
from flexp.planner.plan import make_plan

from .fakes import BLOCKS, MB, FakeCosts, fleet

FULL = {"micro_batches": [8], "checkpointing": [False], "tails": [0]}


def refused(memory: int, **choices: object) -> InfeasibleError:
    devices = [{"name": "small", "count": 3, "memory_bytes": round(1.15 * memory) + 1}, {"name": "big"}]
    with pytest.raises(InfeasibleError) as it:
        make_plan(fleet(devices, choices={**FULL, **choices}), FakeCosts())
    return it.value


# The least is s = 1: 20 + 40 + 8 = 68 MB with exchanges of eight, 61 MB with exchanges of one.
@pytest.mark.parametrize(
    ("memory", "change"),
    [
        (66, "micro-batches of 4 (choices.micro_batches = [4]) would fit (64.0 MB)"),
        (63, "micro-batches of 2"),
        (61, "micro-batches of 1"),
        (60, "texts of 64 tokens (task.length = 64) would fit (60.5 MB)"),
        (45, "LoRA of rank 8"),
        (28, "LoRA of rank 8 in bfloat16"),
        (20, "would fit: it needs more memory or a smaller model"),
    ],
)
def test_the_smallest_change_is_named(memory: int, change: str) -> None:
    # One block keeps as much with checkpointing as without, in this made-up model.
    slack = MB // 2 if memory == 60 else 0
    error = refused(memory * MB + slack)
    (lack,) = error.lacks
    assert lack.devices == ("small-1", "small-2", "small-3")
    assert (lack.what, lack.needed) == ("memory", 68 * MB)
    assert change in lack.change
    assert "small-1 and 2 like it: needs 68.0 MB at the least" in str(error)
    assert "big" not in str(error)


def test_embeddings_in_their_file_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no result; and where a model cannot do without them, nobody hears of it."""
    plain = FakeCosts.memory

    def smaller(self: FakeCosts, task: TaskShape, choice: Choice) -> int:
        return plain(self, task, choice) - (5 * MB if task.embeddings == "file" else 0)

    monkeypatch.setattr(FakeCosts, "memory", smaller)
    words = 'embeddings that stay in their file (task.embeddings = "file") would fit (63.0 MB)'
    assert words in refused(66 * MB).lacks[0].change
    words = 'micro-batches of 2 (choices.micro_batches = [2]) and embeddings in their file (task.embeddings = "file")'
    assert words in refused(58 * MB).lacks[0].change

    def impossible(self: FakeCosts, task: TaskShape, choice: Choice) -> int:
        if task.embeddings == "file":
            raise ModelError("tied")
        return plain(self, task, choice)

    monkeypatch.setattr(FakeCosts, "memory", impossible)
    assert "micro-batches of 4" in refused(66 * MB).lacks[0].change


def test_blocks_in_their_file_have_its_type() -> None:
    task = TaskShape(tuning="lora", blocks="file")
    halves = [each.task for each in _changes(task, Choice((1, 4), 8), FLEET, True) if each.task.dtype == "bfloat16"]
    assert {half.blocks for half in halves} == {"memory"}


def test_the_change_really_fits() -> None:
    """What is proposed is enough, and the next larger micro-batch would not have been."""
    made, memory = FakeCosts(), 66 * MB
    assert "micro-batches of 4" in refused(memory).lacks[0].change
    assert made.memory(TaskShape(), Choice((1, 4), 4, 2)) <= memory < made.memory(TaskShape(), Choice((1, 4), 8))
    devices = [{"name": "small", "memory_bytes": round(1.15 * memory) + 1}]
    plan = make_plan(fleet(devices, choices={**FULL, "micro_batches": [4]}), made)
    assert plan.choice("small").micro_batch == 4


def test_a_deadline_that_nobody_keeps() -> None:
    with pytest.raises(InfeasibleError, match=r"late: its fastest step takes .* its deadline is 0.01 s") as it:
        make_plan(fleet([{"name": "late", "deadline_s": 0.01}, {"name": "fine"}]), FakeCosts())
    (lack,) = it.value.lacks
    assert (lack.what, lack.available) == ("time", 0.01)
    assert "a deadline of" in lack.change


def test_the_machine_that_a_gpu_is_in_counts_as_well() -> None:
    """The GPU has room for every cut; its machine has 21 MB for weights, or 9."""
    here = fleet([{"name": "a"}], margin=0.0)

    def on(host_bytes: int | None) -> Fleet:
        profile = here.devices[0].profile.model_copy(update={"host_bytes": host_bytes})
        return replace(here, devices=(replace(here.devices[0], profile=profile),))

    costs = FakeCosts()
    for host_bytes, held in ((21 * MB, [1, 2]), (None, [1, 2, 3])):
        (device,) = on(host_bytes).devices
        options = options_of(device, [Choice((own, BLOCKS), 8, 1) for own in (1, 2, 3)], costs.predict, lambda _: 0.0)
        assert [option.choice.cut[0] for option in options if fits_memory(option, device)] == held
    assert make_plan(on(21 * MB), costs).solution.options["a"].prediction.host_bytes <= 21 * MB
    with pytest.raises(InfeasibleError) as it:
        make_plan(on(9 * MB), FakeCosts())
    (lack,) = it.value.lacks
    assert (lack.what, lack.needed, lack.available, lack.limit) == ("memory", 10 * MB, 9 * MB, "the machine itself")


def test_a_server_that_is_too_small_or_too_slow() -> None:
    two = [{"name": "a"}, {"name": "b"}]
    tiny = {"class": "server", "memory_bytes": 20 * MB}
    with pytest.raises(InfeasibleError, match=r"its server has .* with the deepest cuts it needs 42\.0 MB") as it:
        make_plan(fleet(two, server=tiny, margin=0.0), FakeCosts())  # one block of 40 MB, and twice 1 MB
    assert it.value.lacks == ()
    many = [{"name": "a", "class": "workstation", "count": 50, "deadline_s": 3.0, "uplink_bps": 1e12}]
    with pytest.raises(InfeasibleError, match=r"its server needs at least 4\.0 s for a step of everybody, later than"):
        make_plan(fleet(many), FakeCosts())  # 50 · 8 examples of one block at 0.01 s
