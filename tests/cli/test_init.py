"""From a user's data to a configuration, and from that to the end of a run; at the smallest size."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import transformers
import typer
from PIL import Image

from flexp.cli.main import main
from flexp.models.zoo import save_tiny
from tests.data.test_chat import CHAT, words
from tests.data.tools import jsonl, labelled
from tests.tiny import bert_folder

Call = Callable[..., str]
QUICK = ["train.rounds=1", "train.steps_per_round=1", "evaluation.measure_memory=false", "output.tensorboard=false",
         "output.html=false", "threads=1"]  # fmt: skip


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    return run


def csv(folder: Path) -> tuple[str, str]:
    table = pd.DataFrame(labelled(200))[["client", "text", "label"]]
    table.loc[::2, "text"] += ","  # commas in texts
    table.to_csv(folder / "reviews.csv", sep=";", index=False, encoding="latin-1")
    return "reviews.csv", str(bert_folder(folder / "model"))


def chats(folder: Path) -> tuple[str, str]:
    rows = [{"office": ["bern", "graz"][k % 2], "messages": [{**CHAT[1], "content": f"w{k} ?"}, CHAT[2]]}
            for k in range(20)]  # fmt: skip
    jsonl(folder / "chats.jsonl", rows)
    words().save_pretrained(save_tiny("llama", folder / "model"))
    return "chats.jsonl", "model"


def tags(folder: Path) -> tuple[str, str]:
    table = pd.DataFrame(labelled(24))[["client", "text"]]
    table["labels"] = [[["red"], ["blue", "red"], []][k // 2 % 3] for k in range(24)]
    table.to_parquet(folder / "tags.parquet")
    return "tags.parquet", str(bert_folder(folder / "model"))


def images(folder: Path) -> tuple[str, str]:
    model = save_tiny("vit", folder / "model")
    size = transformers.AutoConfig.from_pretrained(model).image_size
    transformers.ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(model)
    for number in range(24):
        place = folder / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((size, size, 3), 10 * number, np.uint8)).save(place)
    return "pets", "model"


TOLD = {
    "csv": [
        "reviews.csv: read as columns divided by ';'",
        "label    text   200      2          no (100), yes (100)",
        "north       70            0     30",
        "[CLS] the w0 dog w0 runs [UNK] [SEP]\n→ no",
    ],
    "chats": [
        "messages   chat   20",
        "<|im_start|> [UNK] w0 ? <|im_end|> <|im_start|> [UNK]«a red dog <|im_end|>»",
        "warning: fewer than 25 test examples (bern 3, graz 3)",
    ],
    "tags": ["list   16       2          red (16), blue (8)", "fewer than 25 test examples (north 4, south 4)"],
    "images": ["label    text    24       2          cat (12), dog (12)", "an image, 3 × 12 × 12"],
}


@pytest.mark.parametrize(
    ("make", "task"),
    [(csv, "classification"), (chats, "instruction"), (tags, "multi-label"), (images, "image-classification")],
)
def test_data_become_a_run(tmp_path: Path, call: Call, make: Callable[[Path], tuple[str, str]], task: str) -> None:
    data, model = make(tmp_path)
    settings = [part for setting in QUICK for part in ("--set", setting)]
    shown = call("init", data, "--model", model, "--out", "mine.toml", *settings)
    for line in TOLD[make.__name__]:
        assert line in shown
    said = tomllib.loads((tmp_path / "mine.toml").read_text(encoding="utf-8"))
    assert (said["data"]["source"], said["data"]["task"], said["train"]["rounds"]) == (data, task, 1)
    assert call("data", "mine.toml", "--examples", "0").splitlines()[0].startswith("Client")
    call("run", "mine.toml", "--out", "out")
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["finished"]
    assert summary["warnings"] == [line.removeprefix("warning: ") for line in shown.splitlines() if "warning: " in line]


def test_what_cannot_be_seen_is_asked(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = csv(tmp_path)
    answers: dict[str, list[str]] = {
        "what is a row": ["classification"],
        "data.text": ["texts", "text"],
        "data.label": ["client"],
        "whose is a row": ["0", "2"],
        "which model": [model],
    }
    asked: dict[str, Any] = {}

    def prompt(text: str, default: Any) -> str:
        (found,) = [words for words in answers if words in text]
        asked[found] = default
        return answers[found].pop(0)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(typer, "prompt", prompt)
    call("init", data)
    assert asked == {"what is a row": "classification", "data.text": "text", "data.label": "label",
                     "whose is a row": "client", "which model": "asset:minilm-l6"}  # fmt: skip
    said = tomllib.loads((tmp_path / "reviews.toml").read_text(encoding="utf-8"))["data"]
    assert (said["text"], said["label"]) == ("text", "client")
    assert said["clients"] == {"by": "iid", "count": 2, "cut": [1]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reviews.csv", "--task", "clasification"], "did you mean 'classification'?"),
        (
            ["reviews.csv", "--clients", "hospital", "--model", "m", "--out", "x.toml"],
            "there is no column 'hospital' to name clients",
        ),
        (["reviews.csv", "--model", "model"], "reviews.toml is there already; choose another --out"),
        (["numbers.csv", "--model", "model"], "no task is seen at once to read the columns 'a'"),
        (["pets"], "FlexP brings no model for image-classification"),
        (["none.csv"], "no such file or folder"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path, call: Call, arguments: list[str], message: str
) -> None:
    pd.DataFrame(labelled(20)).to_csv(tmp_path / "reviews.csv", index=False)
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (2, 2)).save(tmp_path / "pets" / label / f"{number}.png")
    (tmp_path / "numbers.csv").write_text("a\n1\n2\n")
    (tmp_path / "reviews.toml").write_text("mine")
    (line,) = call("init", *arguments, code=2).strip().splitlines()
    assert message in line
    assert (tmp_path / "reviews.toml").read_text() == "mine"
    assert not (tmp_path / "pets.toml").exists()


def test_what_cannot_be_run_is_not_written(tmp_path: Path, call: Call) -> None:
    bert_folder(tmp_path / "model")
    (tmp_path / "numbers.csv").write_text("a\n1\n2\n")
    (tmp_path / "mine.toml").write_text("mine")
    asked = ["numbers.csv", "--model", "model", "--task", "instruction", "--out", "mine.toml", "--force"]
    assert "there is no column 'prompt' (data.prompt)" in call("init", *asked, code=2)
    assert (tmp_path / "mine.toml").read_text() == "mine"


@pytest.mark.parametrize(("rows", "most"), [(1200, None), (1800, 400)])
def test_a_first_look_at_many_examples_takes_some_of_them(
    call: Call, tmp_path: Path, rows: int, most: int | None
) -> None:
    table = pd.DataFrame(labelled(rows))[["client", "text", "label"]]
    table.to_csv(tmp_path / "reviews.csv", index=False)
    call("init", "reviews.csv", "--clients", "3", "--model", str(bert_folder(tmp_path / "model")), "--out", "c.toml")
    found = tomllib.loads((tmp_path / "c.toml").read_text(encoding="utf-8"))
    assert found["data"].get("train_examples") == most
    assert found["train"]["steps_per_round"] * found["train"]["batch_size"] >= (most or rows * 0.7 / 3)


def test_a_first_look_takes_clients_with_enough_rows(call: Call, tmp_path: Path) -> None:
    """A client with one row cannot be tested, and with each client the run takes longer."""
    table = pd.DataFrame(labelled(122))[["client", "text", "label"]]
    table["client"] = [f"c{row // 12}" + " " * (row % 2) for row in range(121)] + ["lonely"]
    table.to_csv(tmp_path / "reviews.csv", index=False)
    call("init", "reviews.csv", "--model", str(bert_folder(tmp_path / "model")), "--out", "c.toml")
    text = (tmp_path / "c.toml").read_text(encoding="utf-8")
    clients = tomllib.loads(text)["data"]["clients"]
    assert clients == {"by": "column", "column": "client", "names": [f"c{number}" for number in range(8)], "cut": [1]}
    assert "[method]" not in text
