"""Writing with personal models as a user types it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from flexp.cli.main import main
from flexp.links.grpc import serve
from flexp.run.server import load
from flexp.run.store import Store
from flexp.server import Server
from tests.export.tools import train
from tests.serving.tools import TEMPLATE


class Shell:
    """The command, with what it left on either output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, typed: str = "", code: int = 0) -> tuple[str, str]:
        self._monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        shown = self._capsys.readouterr()
        assert left.value.code == code, shown.err
        return shown.out, shown.err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def test_generate_and_chat(tmp_path: Path, shell: Shell) -> None:
    run = str(train(tmp_path, "llama"))
    more = ("--max-new-tokens", "6", "--temperature", "0")
    text, facts = shell("generate", run, "--client", "north", "--prompt", "the w3 dog", *more)
    assert len(text.split()) == 6
    assert "'north', split at (1, 3), both sides in this process: 6 tokens" in facts
    assert "would go on (--max-new-tokens)" in facts
    assert shell("generate", run, "--client", "north", "--prompt", "-", *more, typed="the w3 dog")[0] == text

    server = Server.from_pretrained(tmp_path / "model")
    load(server, Store(Path(run) / "checkpoints"))
    with serve(server) as serving:
        url = f"grpc://{serving.address}"
        found = shell("generate", run, "--client", "north", "--prompt", "the w3 dog", "--server", url, *more)
        assert found[0] == text
        assert "its middle on a server" in found[1]

    sampled = ("--seed", "3", "--temperature", "2.0", "--top-k", "40", "--top-p", "0.99", "--repetition-penalty", "1.1")
    one, other = (shell("generate", run, "--client", "north", "--prompt", "the", *sampled)[0] for _ in range(2))
    assert one == other

    assert "no chat template" in shell("chat", run, "--client", "north", code=2)[1]
    out = str(tmp_path / "north")
    shell("export", run, "--client", "north", "--out", out)
    Path(out, "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    typed = "the dog\n/reset\n\nthe dog\nthe cat\n/quit\nnever read\n"
    text, facts = shell("chat", out, *more, typed=typed)
    first, again, third = text.splitlines()
    assert first == again  # nothing was left of the first question
    assert len(third.split()) <= 6
    assert facts.splitlines()[-1] == "forgotten"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "empty", "--prompt", "a"], "there is no folder empty"),
        (["generate", "empty", "--prompt", "a", "--top-p", "1.5"], "top_p = 1.5 is not allowed"),
        (["generate", "empty", "--prompt", "a", "--server", "grpc://x:1"], "there is no folder empty"),
        (["chat", "empty"], "there is no folder empty"),
        (["chat", "."], "holds neither a run"),
        (["serve", "empty", "--host", "0.0.0.0"], "set an API key"),
        (["serve", "empty", "--api-key", "short"], "at least 16"),
        (["serve", "empty"], "there is no folder empty"),
        (
            ["generate", "empty", "--prompt", "a", "--seed", "99999999999999999999"],
            "seed = 99999999999999999999 is not",
        ),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLEXP_API_KEY", raising=False)
    (line,) = shell(*arguments, code=2)[1].strip().splitlines()
    assert line.startswith("flexp: ")
    assert message in line
