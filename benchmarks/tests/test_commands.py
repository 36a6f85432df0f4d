"""``python -m benchmarks NAME`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import NAMES, app, gpu
from tests.cli.test_plan import FLEET
from tests.data.tools import jsonl, labelled
from tests.planner.tools import counted_on_tensors
from tests.tiny import bert_folder

from .tools import call, picture_folder

SMALL = ("--steps", "4", "--batch-size", "4", "--max-length", "12", "--test-examples", "8")


def test_every_file_is_a_command() -> None:
    folder = Path(__file__).parents[1]
    assert {f"{name.replace('-', '_')}.py" for name in NAMES} == {path.name for path in folder.glob("[a-z]*.py")}
    assert [command.name for command in app().registered_commands] == NAMES


def test_codec_and_slow_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", labelled(60, ("a", "b")))
    where = ("--model", str(bert_folder(tmp_path / "model")), "--data", str(rows))
    code, shown = call(monkeypatch, capsys, "codec", *where, *SMALL, "--codec", "off", "--codec", "int8-row+feedback")
    assert code == 0
    assert "int8-row+feedback" in shown
    network = ("--round-trip", "2", "--bandwidth", "100", "--timed", "4", "--blocks", "3")
    code, shown = call(monkeypatch, capsys, "slow-link", *where, *SMALL, *network)
    assert code == 0
    assert "fast step (int8-row, 4 under way)" in shown
    code, shown = call(monkeypatch, capsys, "slow-link", *where, *SMALL, *network, "--json", "--in-flight", "2")
    result = json.loads(shown)
    assert (result["bench"], result["in_flight"], result["network"]["latency_s"]) == ("slow-link", 2, 0.001)


def test_server_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--model", str(bert_folder(tmp_path / "model")), "--shapes", "2x8", "--exchanges", "2", "--json")
    code, shown = call(monkeypatch, capsys, "server-shares", *where)
    ((row,), found) = json.loads(shown)["rows"], {"plan", "forward", "gradient", "norms", "optimiser", "rest"}
    assert (code, row["shape"], set(row["shares"])) == (0, [2, 8], found)
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert min(row["shares"].values()) > 0


def test_unknown_codecs_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("codec", "--codec", "zip"), ("slow-link", "--codec", "zip")):
        code, shown = call(monkeypatch, capsys, *arguments)
        assert code != 0
        assert "--codec zip: expected off, bf16, fp16, fp32, fp8, int4, int8-channel" in shown


def test_pfl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = str(picture_folder(tmp_path / "small", 200, 100))
    options = ("--data", pictures, "--method", "fedavg", "--rounds", "1", "--out", str(tmp_path / "out"))
    code, shown = call(monkeypatch, capsys, "pfl", *options)
    assert code == 0
    assert "python -m benchmarks pfl" in shown
    assert "small, dirichlet; accuracy in %" in shown
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
def test_pfl_says_a_users_mistake_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    code, shown = call(monkeypatch, capsys, "pfl", option, value)
    assert code == 2
    (line,) = shown.strip().splitlines()
    assert message in line


def test_plan_shows_three_ways_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(FLEET, encoding="utf-8")
    words = ("plan", str(fleet), "--model", "arch:bert", "--steps", "2")
    with counted_on_tensors():
        code, shown = call(monkeypatch, capsys, *words)
        again, ways_shown = call(monkeypatch, capsys, *words, "--json")
    assert code == again == 0
    for name in ("office (3)", "optimised", "memory-only", "static"):
        assert name in shown
    ways = json.loads(ways_shown)["rows"][0]["ways"]
    assert ways["optimised"]["objective"] <= min(way["objective"] for way in ways.values()) + 1e-9


def test_split_and_whole_write_the_same_and_bytes_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hidden", "64", "--blocks", "3", "--vocabulary", "256", "--tokens", "5", "--prompt", "7"]
    code, shown = call(monkeypatch, capsys, "inference", *options, "--pairs", "4", "--round-trip", "5", "--json")
    assert code == 0
    result = json.loads(shown)
    assert (result["same_tokens"], result["rebuilt"], result["cut"]) == (True, 0, [1, 2])
    positions = 7 + 4  # the last token is written, not read
    assert result["bytes"] == positions * (
        2 * 64 * 4 + 8
    )  # z up, h down, a position; transformers drops a mask of ones
    assert result["slow_tokens_per_second"] < 1 / 0.005
    low, high = result["ratio_quartiles"]
    assert 0 < low <= result["ratio"] <= high


def test_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the processor, by the schema that it prints; a shape for which there is no time is named."""
    options = ("--length", "8", "--examples", "1", "--pairs", "4", "--seconds", "0.1", "--counts", "2")
    with monkeypatch.context() as here:
        here.setattr(gpu, "several", lambda place: [str(place)] * 2)  # the server's blocks are spread over both
        code, shown = call(here, capsys, "gpu", "--shapes", "small", *options, "--device", "cpu", "--json")
    assert code == 0
    (shape,) = gpu.Figures.model_validate_json(shown).shapes
    assert shape.gpus == 2
    assert shape.spread_ratio is not None
    assert shape.spread_ratio > 0
    assert (shape.cut, [at.clients for at in shape.clients], shape.split_bytes) == ((2, 3), [2], None)
    assert shape.ratio > 0
    assert all(at.joined_tokens_per_second > 0 for at in shape.clients)
    short = ("--minutes", "100", "--seconds", "2500", "--counts", "1")  # for a ratio, and for no clients
    code, shown = call(
        monkeypatch, capsys, "gpu", "--shapes", "small", *options[:6], *short, "--device", "cpu", "--json"
    )
    figures = gpu.Figures.model_validate_json(shown)
    assert (figures.shapes[0].clients, figures.seconds < 2500) == ([], True)
    assert figures.left_out["small, 1 clients"].startswith("no time was left")
    code, shown = call(monkeypatch, capsys, "gpu", "--shapes", "small", "--device", "cpu", "--minutes", "0")
    assert code == 0
    assert "small was left out: no time was left" in shown
    assert "several GPUs was left out: there is no second one beside cpu" in shown
    code, shown = call(monkeypatch, capsys, "gpu", "--schema")
    assert set(json.loads(shown)["required"]) >= {"device", "shapes", "left_out", "machine"}
