"""The file of tokens: what it keeps, what it refuses, and that a running server follows it."""

from __future__ import annotations

import hashlib
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flexp.errors import ConfigError, LinkError, StorageError
from flexp.links.grpc import Tokens, connect, serve
from flexp.links.grpc import gate as gates
from flexp.links.grpc import tokens as module
from flexp.links.grpc.tokens import issue, read_tokens, revoke
from tests.harness import world

from .grpc_tools import eventually


def test_a_token_is_shown_once_and_stored_hashed_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tokens"
    token = issue(path, "Klinik Süd")
    assert len(token) == 64
    text = path.read_text(encoding="utf-8")
    assert token not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    issue(path, "b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tokens = Tokens.read(path)
    assert tokens.accept("Klinik Süd", token)
    for client, given in (("Klinik Süd", ""), ("b", token), ("c", token), ("", ""), ("c", ""), ("Klinik Süd", "é")):
        assert not tokens.accept(client, given)


def test_files_of_before_are_read_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    digest = hashlib.sha256(b"old").hexdigest()
    path.write_text(f"# of the ward\n\n{digest} clinic a\n", encoding="utf-8")
    assert Tokens.read(path).accept("clinic a", "old")
    assert read_tokens(path)[0].issued is None
    new = issue(path, "b", days=1)
    revoke(path, "clinic a")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# of the ward", ""]
    assert lines[2].startswith(f"{digest} clinic a\trevoked=20")
    first, second = read_tokens(path)
    assert first.issued is None
    assert first.revoked is not None
    assert second.expires is not None
    assert second.issued is not None
    assert second.expires - second.issued == timedelta(days=1)
    tokens = Tokens.read(path)
    assert tokens.accept("b", new)
    assert not tokens.accept("clinic a", "old")


def test_what_lets_nobody_in_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text("# none yet\n", encoding="utf-8-sig")  # as some editors write it
    empty = Tokens.read(path)
    assert empty.missing(None) == f"{path} has no valid token: nobody can join"
    token = issue(path, "a")
    assert empty.missing(None) is empty.missing(["a"]) is None
    assert empty.missing(["a", "b", "c"]) == f"{path} has no valid token of b, c, who cannot join"
    path.write_text(f"{token} a\n", encoding="utf-8")
    assert not Tokens.read(path).accept("a", token)
    assert "the line of a has a token, expected its SHA-256 hash" in caplog.text
    assert token not in caplog.text


def test_a_valid_token_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    one = issue(path, "a")
    with pytest.raises(ConfigError, match="a has a valid token already; say --again"):
        issue(path, "a")
    assert Tokens.read(path).accept("a", one)
    two = issue(path, "a", again=True)
    tokens = Tokens.read(path)
    assert tokens.accept("a", two)
    assert not tokens.accept("a", one)
    revoke(path, "a")
    with pytest.raises(ConfigError, match="revoked already, at 20"):
        revoke(path, "a")
    three = issue(path, "a")
    assert Tokens.read(path).accept("a", three)
    assert len(read_tokens(path)) == 1
    with pytest.raises(ConfigError, match="no token of b"):
        revoke(path, "b")
    for name in ("", " a", "a\tissued=x", "x" * 201):
        with pytest.raises(ConfigError):
            issue(path, name)
    with pytest.raises(ConfigError, match="days are too many"):
        issue(path, "c", days=1e9)


def test_a_token_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    token = issue(path, "a", days=1)
    tokens = Tokens.read(path)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(hours=hours)

    hours = 23
    monkeypatch.setattr(module, "datetime", Later)
    assert tokens.accept("a", token)
    assert tokens.mark("a") is not None
    hours = 25
    assert not tokens.accept("a", token)
    assert tokens.mark("a") is None


@pytest.mark.parametrize(
    "line", [f"{'1' * 64} a\tissued=yesterday", f"{'1' * 64} a\tadmin=2026-01-31T12:00:00Z", f"{'1' * 64} a\t"]
)
def test_odd_details_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 1: .* is none of issued, expires, revoked"):
        Tokens.read(path)


def test_changes_count_at_once_and_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    one = issue(path, "a")
    tokens = Tokens.read(path)
    two = issue(path, "b")
    assert tokens.accept("b", two)
    revoke(path, "a")
    assert not tokens.accept("a", one)
    path.write_text("nonsense\n", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    assert tokens.accept("b", two)
    assert not tokens.accept("a", one)
    path.unlink()
    assert tokens.accept("b", two)
    with pytest.raises(StorageError, match="cannot be read"):
        Tokens.read(path)


def test_a_running_server_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issued: it may come. Revoked, or issued anew: its live stream ends, and the others' go on."""
    monkeypatch.setattr(gates, "CHECK_SECONDS", 0.02)
    path = tmp_path / "tokens"
    a, b = issue(path, "a"), issue(path, "b")
    here, said = world("llama"), []
    with serve(here.server, tokens=Tokens.read(path), say=said.append) as serving:
        url = f"grpc://{serving.address}"
        links = {name: connect(url, name, token=token) for name, token in (("a", a), ("b", b))}
        models = {name: here.client(name, (2, 4), link=link) for name, link in links.items()}
        for model in models.values():
            model(**here.batch())
        revoke(path, "a")
        assert eventually(lambda: serving.clients == ["b"])
        with pytest.raises(LinkError, match="client a: its token is not valid any more"):
            models["a"](**here.batch())
        with pytest.raises(LinkError, match="client and token do not go together"):
            connect(url, "a", token=a)
        assert eventually(lambda: "a" not in here.server._sessions)  # and what it had in flight is dropped
        models["b"](**here.batch()).loss.backward()
        c = issue(path, "c")
        connect(url, "c", token=c).close()
        issue(path, "b", again=True)
        assert eventually(lambda: not serving.clients)
        for link in links.values():
            link.close()
    assert "a: thrown out, since its token is not valid any more" in said
