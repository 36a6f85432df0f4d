"""``python -m benchmarks codec`` and ``python -m benchmarks slow-link`` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.tools import jsonl, labelled
from tests.tiny import bert_folder

from .tools import call

SMALL = ("--steps", "4", "--batch-size", "4", "--max-length", "12", "--test-examples", "8")


def test_tables_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", labelled(60, ("a", "b")))
    where = ("--model", str(bert_folder(tmp_path / "model")), "--data", str(rows))
    code, shown = call(monkeypatch, capsys, "codec", *where, *SMALL, "--codec", "off", "--codec", "int8-row+feedback")
    assert code == 0
    assert "int8-row+feedback: loss " in shown
    network = ("--round-trip", "2", "--bandwidth", "100", "--timed", "4", "--blocks", "3")
    code, shown = call(monkeypatch, capsys, "slow-link", *where, *SMALL, *network)
    assert code == 0
    assert "fast step (int8-row, 4 under way)" in shown
    code, shown = call(monkeypatch, capsys, "slow-link", *where, *SMALL, *network, "--json", "--in-flight", "2")
    result = json.loads(shown)
    assert (result["bench"], result["in_flight"], result["network"]["latency_s"]) == ("slow-link", 2, 0.001)


def test_unknown_codecs_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("codec", "--codec", "zip"), ("slow-link", "--codec", "zip")):
        code, shown = call(monkeypatch, capsys, *arguments)
        assert code != 0
        assert "--codec zip: expected off, fp32, bf16, fp16, int8-channel" in shown
