"""``python -m benchmarks pfl`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .tools import call, picture_folder


def test_a_table_of_methods_and_the_same_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = str(picture_folder(tmp_path / "small", 200, 100))
    options = ("--data", pictures, "--method", "fedavg", "--rounds", "1", "--out", str(tmp_path / "out"))
    code, shown = call(monkeypatch, capsys, "pfl", *options)
    assert code == 0
    assert "fedavg round 1: " in shown
    assert "python -m benchmarks pfl: small, dirichlet" in shown
    code, shown = call(monkeypatch, capsys, "pfl", *options, "--json")  # nothing is left to train
    result = json.loads(shown)
    assert (result["bench"], result["clients"], sum(result["sizes"])) == ("pfl", 20, 220)
    assert result["rows"][0]["rounds"] == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--partition", "iid", "expected dirichlet or pathological"),
        ("--method", "splitfed", "expected one of local"),
        ("--data", "nowhere", "dataset-fashion-mnist"),
    ],
)
def test_a_users_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    code, shown = call(monkeypatch, capsys, "pfl", option, value)
    assert code == 2
    (line,) = shown.strip().splitlines()
    assert message in line
