"""``python -m benchmarks plan`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_plan import FLEET

from .tools import call


def test_three_ways_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET, encoding="utf-8")
    words = ("plan", str(fleet), "--model", "arch:bert", "--steps", "2")
    code, shown = call(monkeypatch, capsys, *words)
    assert code == 0
    for name in ("office (3)", "optimised", "memory-only", "static"):
        assert name in shown
    code, shown = call(monkeypatch, capsys, *words, "--json")
    ways = json.loads(shown)["rows"][0]["ways"]
    assert ways["optimised"]["objective"] <= min(way["objective"] for way in ways.values()) + 1e-9
