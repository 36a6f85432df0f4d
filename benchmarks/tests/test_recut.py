"""The bench of moves: what it says is what was done."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recut import WINDOW, bench
from benchmarks.tiny_run import tiny_run
from flexp.errors import ConfigError


def test_moves_are_timed_and_their_losses_set_beside_a_twins(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, rounds=1, steps_per_round=1, dropout=0.0)
    found = bench(config, [(1, 4), (3, 4), (1, 4), (3, 4)], client="north", steps=2 * WINDOW)
    there, back, again = found["rows"]
    assert (there["came"], there["restored"], back["went"], again["restored"]) == ([1, 2], [], [1, 2], [1, 2])
    assert all(row["seconds"] > 0 and row["steps"] == row["seconds"] / row["step_seconds"] for row in found["rows"])
    assert all(row["jump"] == row["loss_change"] - row["twin_change"] for row in found["rows"])
    same = bench(config, [(1, 4), (3, 4)], client="north", steps=2 * WINDOW)
    assert same["rows"][0]["loss_before"] == there["loss_before"]


def test_a_cut_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, rounds=1, steps_per_round=1)
    with pytest.raises(ConfigError, match="--cuts"):
        bench(config, [(1, 4), (7, 9)], client="north")
