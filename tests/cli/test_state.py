"""``flexp state`` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flexp.cli.main import main
from tests.export.tools import train


def test_back_up_show_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(train(tmp_path, "bert"))
    plain, secret = str(tmp_path / "north.safetensors"), str(tmp_path / "secret.safetensors")
    monkeypatch.setattr("flexp.export.sealed.LOG_N", 10)  # what a passphrase costs is tests/export/test_sealed.py's
    monkeypatch.setenv("WORDS", "open sesame")
    monkeypatch.setenv("OTHER", "open barley")

    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flexp", "state", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.err if code else captured.out

    assert "not encrypted" in call("backup", run, "--client", "north", "--out", plain)
    shown = call("backup", run, "--client", "north", "--out", secret, "--passphrase-env", "WORDS")
    assert "'north' after round 1" in shown
    assert ", encrypted, in" in shown
    for word in ("north", "flexp-sfl, cut (1, 3), full, float32", "after round 1 (2 steps)", "no, yes"):
        assert word in call("show", plain)
    facts = json.loads(call("show", secret, "--passphrase-env", "WORDS", "--json"))
    assert (facts["client"], facts["encrypted"], facts["cut"]) == ("north", True, [1, 3])
    shown = call("restore", secret, "--into", run, "--passphrase-env", "WORDS")
    assert f"flexp run --resume {run}" in shown
    assert "note:" not in shown
    for wrong, message in (
        (["show", secret], "there is no terminal to ask on; use --passphrase-env"),
        (["show", secret, "--passphrase-env", "OTHER"], "the passphrase does not open it"),
        (["show", secret, "--passphrase-env", "NONE"], "there is no such variable"),
        (["restore", plain, "--into", str(tmp_path)], "holds no run"),
        (["restore", plain, "--into", run, "--client", "south"], "another cut"),
        (["backup", run, "--client", "north", "--out", plain], "exists already"),
        (["backup", run, "--client", "north", "--out", plain + "2", "--encrypt"], "no terminal"),
    ):
        (line,) = call(*wrong, code=2).strip().splitlines()
        assert line.startswith("flexp: ")
        assert message in line
