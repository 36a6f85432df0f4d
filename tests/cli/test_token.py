"""``flexp token`` and ``flexp readmit`` as they are typed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from flexp.cli.main import main
from flexp.config import GuardConfig, ServerConfig
from flexp.errors import BadValuesError
from flexp.links.grpc import Tokens, serve
from flexp.links.grpc.tokens import issue
from flexp.run.status import StatusReporter
from tests.harness import world
from tests.links.grpc_tools import make_certificates


class Typed:
    """Runs ``flexp …`` and gives its exit code and what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        shown = self._capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err


@pytest.fixture
def flexp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    monkeypatch.delenv("FLEXP_TOKEN", raising=False)
    return Typed(monkeypatch, capsys)


def test_issue_list_check_revoke(flexp: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ("--file", str(tmp_path / "tokens"))
    code, out, err = flexp("token", "issue", "clinic a", *file, "--days", "30")
    token = out.strip()
    assert code == 0
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert "stored nowhere" in err
    assert token not in err
    flexp("token", "issue", "b", *file)
    monkeypatch.setenv("FLEXP_TOKEN", token)
    assert flexp("token", "check", "clinic a", *file)[:2] == (0, "a valid token of clinic a\n")
    for odd in ("\u00e9", "\udcff", "a\nb"):
        monkeypatch.setenv("FLEXP_TOKEN", odd)
        code, _, err = flexp("token", "check", "clinic a", *file)
        assert code == 2
        assert "has characters that no token has" in err
    monkeypatch.setenv("FLEXP_TOKEN", f"{token}\r\n")
    assert flexp("token", "check", "clinic a", *file)[0] == 0
    code, _, err = flexp("token", "check", "b", *file)
    assert code == 2
    assert "this is no valid token of b" in err
    code, _, err = flexp("token", "issue", "b", *file)
    assert code == 2
    assert "say --again" in err
    assert flexp("token", "revoke", "clinic a", *file)[0] == 0
    assert flexp("token", "check", "clinic a", *file)[0] == 2
    code, out, _ = flexp("token", "list", *file)
    lines = out.splitlines()
    assert re.fullmatch(r"revoked  clinic a  issued \S+Z  expires \S+Z  revoked \S+Z", lines[0])
    assert re.fullmatch(r"valid    b         issued \S+Z", lines[1])
    code, _, err = flexp("token", "list", "--file", str(tmp_path / "none"))
    assert code == 2
    assert "cannot be read" in err


def test_readmit(flexp: Typed, tmp_path: Path) -> None:
    here = world("llama", config=ServerConfig(guard=GuardConfig(strikes=1)))
    with pytest.raises(BadValuesError), here.server.guard.request("a"):
        raise BadValuesError("bad")
    own = ("--token", issue(tmp_path / "tokens", "operator"))
    with serve(here.server, tokens=Tokens.read(tmp_path / "tokens")) as serving:
        assert flexp("readmit", str(serving.address), "a", *own)[:2] == (0, "a may join again\n")
        code, _, err = flexp("readmit", str(serving.address), "a", *own)
    assert code == 2
    assert "has not quarantined a" in err
    assert here.server.aside("a") is None


def test_who_asks_a_server_that_asks_for_certificates(
    flexp: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, made = world("llama"), make_certificates(tmp_path)
    token, (cert, key) = issue(tmp_path / "tokens", "operator"), made.client
    with serve(here.server, tls=made.tls(mutual=True), tokens=Tokens.read(tmp_path / "tokens"),
               facts=StatusReporter(here.server).facts) as serving:  # fmt: skip
        own = (f"grpcs://{serving.address}", "--ca", str(made.ca), "--cert", str(cert), "--key", str(key))
        code, out, _ = flexp("status", *own, "--token", token)
        assert code == 0
        assert "0 updates" in out
        monkeypatch.setenv("FLEXP_CA", str(made.ca))
        _, _, err = flexp("readmit", own[0], "a", *own[3:], "--token", token)
        assert "has not quarantined a" in err
