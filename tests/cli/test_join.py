"""``flexp join`` as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexp.cli.main import main
from tests.export.tools import CUTS, train


def test_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clients = {"names": ["north", "south"], "each": [{"cut": cut} for cut in CUTS]}
    data = {"source": str(tmp_path / "rows.jsonl"), "clients": clients}
    run = str(train(tmp_path, "bert", clients=("east", "north", "south"), data=data))
    out = str(tmp_path / "out")

    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.err if code else captured.out

    shown = call("join", run, "--name", "east", "--out", out, "--cut", "1:3", "--steps", "4", "--every", "2")
    table = [line.split()[0] for line in shown.partition("steps  accuracy")[2].splitlines()[1:4]]
    assert table == ["0", "2", "4"]
    assert "everybody's" not in shown.partition("steps  accuracy")[2]
    assert "own test data" in call("evaluate", out)
    call("export", out, "--out", str(tmp_path / "personal"))
    for wrong, message in (
        (["join", run, "--name", "east", "--out", out], "holds a run already"),
        (["join", run, "--name", "east", "--out", out + "2", "--start", "x", "--passphrase-env", "NONE"], "NONE"),
        (["join", run, "--name", "east", "--out", out + "2", "--cut", "1"], "is no cut"),
    ):
        (line,) = call(*wrong, code=2).strip().splitlines()
        assert line.startswith("flexp: ")
        assert message in line
