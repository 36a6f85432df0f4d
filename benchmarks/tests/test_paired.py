"""Steps are timed in turn, each of them equally often, and what comes first changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import paired as module
from benchmarks.paired import WARM_UP, paired


def test_both_run_equally_often_and_take_turns_at_being_first() -> None:
    seen: list[str] = []
    paired(lambda: seen.append("a"), lambda: seen.append("b"), 4)
    assert "".join(seen) == "ab" * WARM_UP + "ba" + "ab" + "ba" + "ab"


def test_ratios_are_of_the_pairs_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    durations = {"a": [100.0] * WARM_UP + [1.0, 2.0, 4.0, 8.0], "b": [1.0] * WARM_UP + [2.0, 6.0, 16.0, 40.0]}
    steps = {name: iter(values) for name, values in durations.items()}

    def step(name: str) -> None:
        now[0] += next(steps[name])

    timed = paired(lambda: step("a"), lambda: step("b"), 4)  # second ÷ first: 2, 3, 4, 5
    assert (timed.ratio, timed.first, timed.second) == (3.5, 3.0, 11.0)
    assert timed.quartiles == [2.25, 4.75]
