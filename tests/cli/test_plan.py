"""``flexp plan`` as a user types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexp.cli.main import main
from flexp.models.zoo import save_tiny
from tests.planner.tools import counted_on_tensors

FLEET = """name = "office"
[task]
length = 16
batch_size = 4
[choices]
codecs = ["none", "bf16"]
[[devices]]
name = "phone"
class = "phone"
count = 2
[[devices]]
name = "laptop"
class = "laptop"
"""


@pytest.fixture(autouse=True, scope="module")
def _counted_on_tensors() -> Iterator[None]:
    with counted_on_tensors():
        yield


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET, encoding="utf-8")
    return path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr()
    return int(left.value.code or 0), shown.out, shown.err


def test_a_table_a_file_and_a_page(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    code, shown, _ = call(
        monkeypatch, capsys, "plan", "arch:bert", "--devices", str(fleet), "--out", str(out), "--plot", str(page),
        "--pareto", "--set", "task.tuning=lora",
    )  # fmt: skip
    assert code == 0
    for words in ("office", "phone-1", "laptop", "Not deeper", "Not shallower", "Pareto front", "prior"):
        assert words in shown
    # What a run does not take from the plan is told in one line.
    line = next(line for line in shown.splitlines() if "it must say" in line)
    assert line.endswith('it must say train.batch_size = 4, model.tuning = "lora", model.lora.rank = 8.')
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [client["name"] for client in content["clients"]] == ["phone-1", "phone-2", "laptop"]
    assert len(content["settings"]["data.clients.each"]) == 3
    assert "office" in page.read_text(encoding="utf-8")
    options = ("--devices", str(fleet), "--set", "task.embeddings=file")
    code, _, said = call(monkeypatch, capsys, "plan", "arch:bert", *options)
    assert code == 2
    assert "arch:bert has no file" in said
    code, shown, _ = call(monkeypatch, capsys, "plan", str(save_tiny("bert", tmp_path / "model")), *options)
    assert 'it must say train.batch_size = 4, model.embeddings = "file".' in shown
    lean = (*options[:2], "--set", "task.tuning=lora", "--set", "task.blocks=file")
    code, shown, _ = call(monkeypatch, capsys, "plan", str(tmp_path / "model"), *lean)
    assert 'it must say train.batch_size = 4, model.blocks = "file", model.tuning' in shown
    bound = (*options[:2], "--set", "privacy.max_content_words=0.5", "--set", "choices.starts=[9]")
    code, _, said = call(monkeypatch, capsys, "plan", str(tmp_path / "model"), *bound)
    assert code == 2
    assert "choices.starts = 9 leaves the server no block of 4; expected 3 at most" in said
    code, shown, _ = call(monkeypatch, capsys, "plan", "arch:bert", "--devices", str(fleet), "--json")
    assert code == 0
    assert json.loads(shown)["totals"]["round_seconds"] > 0


def test_an_infeasible_fleet_is_told_who_lacks_what(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "starts = [1]\ntails = [0]\nmicro_batches = [4]\ncheckpointing = [false]\n"
    fleet.write_text(FLEET.replace("[choices]\n", f"[choices]\n{only}"), encoding="utf-8")
    _, shown, _ = call(monkeypatch, capsys, "plan", "arch:bert", "--devices", str(fleet), "--json")
    needed = json.loads(shown)["clients"][0]["predicted"]["memory_bytes"]
    small = f"memory_bytes = {int(1.15 * needed) - 2}"
    text = fleet.read_text(encoding="utf-8").replace('"phone"\ncount', f'"phone"\n{small}\ncount')
    fleet.write_text(text, encoding="utf-8")
    code, shown, said = call(monkeypatch, capsys, "plan", "arch:bert", "--devices", str(fleet))
    assert (code, shown) == (2, "")
    assert said.startswith("flexp: office cannot train arch:bert: phone-1 and 1 like it: needs ")
    assert "short); micro-batches of 2 (choices.micro_batches = [2]) would fit" in said
    assert len(said.splitlines()) == 1
    fleet.write_text(FLEET + "colour = 1\n", encoding="utf-8")
    code, _, said = call(monkeypatch, capsys, "plan", "arch:bert", "--devices", str(fleet))
    assert code == 2
    assert "unknown key devices.2.colour" in said or "unknown key devices" in said
