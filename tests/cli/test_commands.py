"""The commands as a user types them: output, exit codes, and one line for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flexp import __version__
from flexp.cli.main import main
from flexp.cli.run import fresh
from tests.tiny import bert_folder, content


def toml(folder: Path, **changes: object) -> Path:
    """The tiny configuration as a file; TOML is written by hand as JSON-like inline tables."""

    def inline(value: object) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + " }"
        if isinstance(value, list):
            return "[" + ", ".join(inline(item) for item in value) + "]"
        return json.dumps(value)

    tables = content(folder, **changes)
    for number, own in enumerate(tables["data"]["clients"]["each"]):
        own["cut"] = [[1, 4], [3, 4]][number % 2]
    path = folder / "run.toml"
    path.write_text("\n".join(f"{key} = {inline(value)}" for key, value in tables.items()), encoding="utf-8")
    tomllib.loads(path.read_text(encoding="utf-8"))
    return path


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flexp.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"flexp {__version__}"


def test_run_then_report_then_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert_folder(tmp_path / "model")
    path = toml(tmp_path, output={"html": True})
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
        return capsys.readouterr().out

    shown = call("run", str(path), "--set", "train.rounds=2", "--out", "out", "--seed", "5")
    few = "fewer than 25 test examples (north 9, south 9, west 9)"
    for word in (
        f"warning: {few}",
        "12/9",
        "Major-",
        "north",
        "south",
        "west",
        "(1, 4)",
        "(3, 4)",
        "Report: file://",
        "personal weights in",
    ):
        assert word in shown
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert (summary["seed"], summary["rounds"], summary["finished"]) == (5, 2, True)
    assert [line.startswith(few) for line in summary["warnings"]] == [True]
    assert summary["clients"][0]["majority"]["personal"] == pytest.approx(5 / 9)  # two labels in turn
    assert summary["test_examples"] == 27
    (tmp_path / "out/report.html").unlink()
    call("report", "out")
    assert few in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    call("run", "--resume", "out")
    assert json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["scores"] == summary["scores"]


def test_a_run_without_any_score_ends_with_an_error_after_writing_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bert_folder(tmp_path / "model")
    personal = {"lr": 1e20}
    train = {"rounds": 1, "steps_per_round": 1, "batch_size": 4, "personal": personal}
    path = toml(tmp_path, method={"name": "local"}, train=train)
    monkeypatch.setattr(sys, "argv", ["flexp", "run", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no client's model answers with finite numbers" in line
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert (summary["finished"], summary["not_finite"]) == (True, ["north", "south", "west"])
    assert (tmp_path / "out/checkpoints").is_dir()


def test_a_run_may_be_called_anything() -> None:
    for name, start in (("../a b", "a-b-2"), ("[red]x[/]", "red-x-2"), ("//", "run-2")):
        folder = fresh(name)
        assert folder.parent == Path("runs")
        assert folder.name.startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "say which run"),
        (["run", "none.toml"], "cannot be read"),
        (["run", "run.toml", "--set", "train.runds=2"], "did you mean 'rounds'?"),
        (["run", "run.toml", "--set", "data.label=lable"], "label"),
        (["run", "run.toml", "--set", "model.id=/nowhere/model"], "was not found"),
        (["run", "run.toml", "--set", "data.clients.each=[{cut=[3, 3]}]"], "does not fit a model of 4 blocks"),
        (["run", "--resume", "empty"], "holds no run to resume"),
        (["run", "run.toml", "--resume", "empty"], "leave out CONFIG"),
        (["report", "empty"], "summary.json"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    bert_folder(tmp_path / "model")
    toml(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flexp: ")
    assert message in line
