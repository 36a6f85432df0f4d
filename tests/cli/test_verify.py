"""`flexp verify` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flexp.cli.main import app, main
from flexp.cli.verify import parse_cut
from flexp.errors import ConfigError
from flexp.models.zoo import save_tiny
from flexp.run.verify import Outcome, Setup


def flexp(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments])


def test_a_folder(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    done = flexp(str(tmp_path), "--cut", "2:", "--padding", "left", "--steps", "2", "--memory", "recompute")
    assert done.exit_code == 0
    out = done.stdout
    assert f"{tmp_path}: causal-lm, 4 blocks, sdpa attention" in out
    assert "the server runs blocks [2, 4) and holds [2, 4)" in out
    assert "dropout set to 0" in out
    assert "random inputs (3 examples of 10 tokens, padding: left" in out
    for what in ("logits", "gradients", "losses", "weights"):
        assert f"  {what:10} 0.0\n" in out
    assert out.endswith("exact: split training is the whole model's\n")


def test_json() -> None:
    done = flexp("arch:bert", "--json", "--tuning", "lora", "--steps", "1", "--dtype", "bfloat16", "--threads", "1")
    values = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (values["exact"], values["weights"], values["cut"]) == (True, 0.0, [1, 3])


def test_a_difference_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexp.run import verify

    wrong = Outcome(Setup.of("arch:llama", cut=(1, 3), base_depth=1), 4, 39, 1.25e-7, 0.0, 0.0, float("inf"))
    monkeypatch.setattr(verify, "verify", lambda setup: wrong)
    done = flexp("arch:llama")
    assert done.exit_code == 1
    assert "  logits     1.2e-07\n" in done.stdout
    assert done.stdout.endswith("NOT exact: split training differs\n")
    monkeypatch.setattr(verify, "verify_all", lambda setup, say: [wrong])
    done = flexp("--all")
    assert done.exit_code == 1
    assert "differs" in done.stdout


def test_all_and_list(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = flexp("--list")
    assert listed.exit_code == 0
    assert "arch:llama" in listed.stdout
    assert "one block is applied again and again" in " ".join(listed.stdout.split())
    entries = json.loads(flexp("--list", "--json").stdout)
    from flexp.run import verify

    assert [entry["name"] for entry in entries] == list(verify.ARCHITECTURES)
    kept = {name: verify.ARCHITECTURES[name] for name in ("gpt2", "albert", "vit")}
    monkeypatch.setattr(verify, "ARCHITECTURES", kept)
    done = flexp("--all", "--steps", "1")
    assert done.exit_code == 0
    assert done.stdout.count("exact") == 2
    assert [value["exact"] for value in json.loads(flexp("--all", "--steps", "1", "--json").stdout)] == [True, True]


def test_all_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexp.run import verify

    monkeypatch.setattr(verify, "ARCHITECTURES", {"gpt2": verify.ARCHITECTURES["gpt2"]})
    done = flexp("--all", "--autocast", "--steps", "1")
    assert done.exit_code == 0
    assert "(autocast: bfloat16," in done.stdout
    assert done.stdout.count("exact") == 1
    (value,) = json.loads(flexp("--all", "--autocast", "--steps", "1", "--json").stdout)
    assert (value["autocast"], value["exact"], value["logits"], value["weights"]) == ("bfloat16", True, 0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["arch:albert"], "arch:albert cannot be split: one block is applied again"),
        (["arch:llama", "--cut", "1-3"], "--cut '1-3' is no cut: expected S:E"),
        (["arch:llama", "--cut", "3:1"], "--cut = (3, 1) does not fit a model of 4 blocks"),
        ([], "expected a model"),
        (["arch:llama", "--all"], "expected a model"),
        (["/no/such/folder"], "model '/no/such/folder' was not found"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flexp", "verify", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert reason in capsys.readouterr().err


def test_one_token_predicts_nothing() -> None:
    done = flexp("arch:llama", "--length", "1")
    assert done.exit_code == 2
    assert "--length" in done.stderr


def test_cuts_are_read() -> None:
    assert [parse_cut(text) for text in ("0:4", "2:", " 1 : 3 ")] == [(0, 4), (2, None), (1, 3)]
    for text in ("", ":", "3", ":3", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(ConfigError, match="is no cut"):
            parse_cut(text)
