"""What the measurement of writing says, and what it counts."""

from __future__ import annotations

import json

import pytest

from .tools import call


def test_split_and_whole_write_the_same_and_bytes_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hidden", "64", "--blocks", "3", "--vocabulary", "256", "--tokens", "5", "--prompt", "7"]
    code, shown = call(monkeypatch, capsys, "inference", *options, "--pairs", "4", "--round-trip", "5", "--json")
    assert code == 0
    result = json.loads(shown)
    assert (result["same_tokens"], result["rebuilt"], result["cut"]) == (True, 0, [1, 2])
    positions = 7 + 4  # the last token is written, not read
    assert result["bytes"] == positions * (
        2 * 64 * 4 + 8
    )  # z up, h down, a position; transformers drops a mask of ones
    assert result["slow_tokens_per_second"] < 1 / 0.005
    low, high = result["ratio_quartiles"]
    assert 0 < low <= result["ratio"] <= high
