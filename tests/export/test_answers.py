"""Scores and predictions, as numbers and through the commands."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from flexp.cli.main import app, main
from flexp.errors import ConfigError, DataError, ModelError, StorageError
from flexp.export.answers import predict, score
from flexp.export.folder import export
from flexp.export.opening import open_trained
from flexp.export.saved import open_run
from flexp.export.trained import EVERYBODY, OWN, Trained
from tests.data.tools import jsonl

from .tools import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    place = train(folder, "bert", evaluation={"global_examples": 7, "measure_memory": False})
    export(open_trained(place, "south"), folder / "out")
    return place


def diary(run: Path, number: int) -> dict[str, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(r for r in records if r["kind"] == "eval" and r["round"] == number and r["client"] == "south")


def test_scores_are_the_runs_own(run: Path) -> None:
    model = open_trained(run, "south")
    assert score(model) == {OWN: diary(run, 1)["personal"], EVERYBODY: diary(run, 1)["global"]}
    assert score(model, pretrained=True) == {OWN: diary(run, 0)["personal"], EVERYBODY: diary(run, 0)["global"]}
    exported = open_trained(run.parent / "out", run=run)
    assert score(exported) == score(model)


def test_a_file_with_labels(run: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the w{k} dog runs", "label": ("no", "yes")[k % 2]} for k in range(9)]
    source = str(jsonl(tmp_path / "rows.jsonl", rows))
    found = [score(open_trained(place, "south"), source, batch_size=4) for place in (run, run.parent / "out")]
    assert found[0] == found[1]
    assert found[0][source]["n"] == 9
    out = tmp_path / "out.jsonl"
    assert predict(open_trained(run, "south"), source, out) == 9
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    right = sum(line["predicted"] == row["label"] for line, row in zip(lines, rows, strict=True))
    assert right / 9 == found[0][source]["accuracy"]
    jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "the dog", "label": "maybe"}])
    with pytest.raises(DataError, match=r"rows.jsonl, line 10: the label 'maybe' is none of .* no, yes"):
        score(open_trained(run, "south"), source)


def test_of_a_folder_its_tests_are_scored_and_what_was_cut_is_told(run: Path, tmp_path: Path) -> None:
    """Its training file is what the model may have learned."""
    rows = [{"text": "the dog " * (3 * k), "label": ("no", "yes")[k % 2]} for k in range(1, 9)]
    jsonl(tmp_path / "d/train.jsonl", rows)
    jsonl(tmp_path / "d/test.jsonl", [*rows[:5], {"text": "NULL", "label": "no"}])
    told: list[str] = []
    found = score(open_trained(run, "south"), str(tmp_path / "d"), say=told.append)
    assert found[str(tmp_path / "d")]["n"] == 6
    assert "its files for tests are read" in told[0]
    assert "column 'text' has 'NULL' in 1 row, as exports write" in told[1]
    assert "3 of 6 texts were cut" in told[2]
    assert score(open_trained(run, "south"), f"{tmp_path / 'd'}#train")[f"{tmp_path / 'd'}#train"]["n"] == 8


def test_predictions_keep_the_rows_order_and_need_no_labels(run: Path, tmp_path: Path) -> None:
    texts = ["the", "the red dog sleeps now", "a cat", "the w3 dog w1 runs fast slowly now"]
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\n" + "\n".join(texts) + "\n", encoding="utf-8")
    model = open_trained(run.parent / "out")
    predict(model, str(source), out, batch_size=2)
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    for text, row in zip(texts, rows, strict=True):
        assert abs(float(row["no"]) + float(row["yes"]) - 1.0) < 1e-9
        assert float(row["probability"]) == max(float(row["no"]), float(row["yes"])) == float(row[row["predicted"]])
        source.write_text(f"text\n{text}\n", encoding="utf-8")
        predict(model, str(source), tmp_path / "one.csv", force=True)
        alone = next(csv.DictReader((tmp_path / "one.csv").open(encoding="utf-8")))
        assert float(alone["yes"]) == pytest.approx(float(row["yes"]), abs=1e-6)


@pytest.mark.parametrize("label", ["row", "predicted", "probability"])
def test_a_class_that_is_called_as_a_column(run: Path, tmp_path: Path, label: str) -> None:
    """Of two columns of one name most readers keep one."""
    folder = shutil.copytree(run.parent / "out", tmp_path / "out")
    text = (folder / "flexp.json").read_text(encoding="utf-8")
    (folder / "flexp.json").write_text(text.replace('"yes"', f'"{label}"'), encoding="utf-8")
    source = jsonl(tmp_path / "in.jsonl", [{"text": "the dog"}])
    with pytest.raises(ConfigError, match=rf"two columns would be called '{label}', .* write a \.jsonl"):
        predict(open_trained(folder), str(source), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    assert predict(open_trained(folder), str(source), tmp_path / "out.jsonl") == 1
    row = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert row["probabilities"].keys() == {"no", label}


def test_nothing_is_written_over(run: Path, tmp_path: Path) -> None:
    """Neither another file, unless it is asked for, nor in any case the rows themselves."""
    source, other = tmp_path / "in.csv", tmp_path / "mine.csv"
    for path in (source, other):
        path.write_text("text\nthe dog\n", encoding="utf-8")
    (tmp_path / "link.csv").symlink_to(source)
    model = open_trained(run.parent / "out")
    for out in (source, tmp_path / "link.csv"):
        with pytest.raises(ConfigError, match="is what is read; choose another --out"):
            predict(model, str(source), out, force=True)
    asked = ["predict", str(run.parent / "out"), "--data", str(source), "--out", str(other)]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, ConfigError)
    assert "mine.csv: exists already; choose another --out, or say --force" in str(refused.exception)
    assert source.read_text(encoding="utf-8") == other.read_text(encoding="utf-8") == "text\nthe dog\n"
    assert CliRunner().invoke(app, [*asked, "--force"]).exit_code == 0
    assert other.read_text(encoding="utf-8").startswith("row,predicted")


def test_what_cannot_be_answered(run: Path, tmp_path: Path) -> None:
    exported = run.parent / "out"
    with pytest.raises(ConfigError, match="say --data FILE, or --run RUN"):
        score(open_trained(exported))
    with pytest.raises(ConfigError, match="holds the personal model of 'south', not of 'north'"):
        open_trained(exported, "north")
    with pytest.raises(StorageError, match="neither a run"):
        open_trained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.csv or \.jsonl"):
        predict(open_trained(exported), "in.csv", tmp_path / "out.txt")
    source = tmp_path / "in.csv"
    source.write_text("words\nthe dog\n", encoding="utf-8")
    with pytest.raises(DataError, match="there is no column 'text'"):
        predict(open_trained(exported), str(source), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_model_that_answers_with_nan_labels_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would write the first label, and nan beside it."""
    source = str(jsonl(tmp_path / "rows.jsonl", [{"text": "the dog" + k * " now", "label": "no"} for k in range(5)]))

    def spoilt(model: Trained) -> Trained:
        forward = model.forward

        def broken(batch: dict[str, Tensor]) -> Any:
            logits = forward(batch).logits
            logits[batch["attention_mask"].sum(1) == 6] = torch.nan  # one row
            logits[:, 0][batch["attention_mask"].sum(1) == 5] = -torch.inf  # an answer: it cannot be the first
            return SimpleNamespace(logits=logits)

        model.__dict__["forward"] = broken
        return model

    out = tmp_path / "out.csv"
    out.write_text("mine")
    with pytest.raises(
        ModelError, match=r"of south answers 1 of 5 rows with numbers that are not finite, so nothing is"
    ):
        predict(spoilt(open_trained(run, "south")), source, out, batch_size=2, force=True)
    assert out.read_text() == "mine"
    monkeypatch.setattr("flexp.export.opening.open_trained", lambda *of, **more: spoilt(open_trained(*of, **more)))
    monkeypatch.setattr(sys, "argv", ["flexp", "evaluate", str(run), "--client", "south", "--data", source, "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["scores"]["personal"][source]["accuracy"] is None
    assert (
        "the personal model of south answers 1 of 5 examples with numbers that are not finite: no scores" in shown.err
    )


def test_an_adapter_of_a_language_model(tmp_path: Path) -> None:
    place = train(tmp_path, "gpt2", model={"id": str(tmp_path / "model"), "tuning": "lora"})
    export(open_trained(place, "north"), tmp_path / "out", form="adapter")
    model = open_trained(tmp_path / "out", run=place)
    assert score(model) == score(open_trained(place, "north"))
    with pytest.raises(ConfigError, match="flexp predict is for classifiers and such; this model is for causal-lm"):
        predict(model, "in.csv", tmp_path / "out.csv")


def test_images(tmp_path: Path) -> None:
    place = train(tmp_path, "vit")
    client = open_run(place).world.federation.clients[0].name
    export(open_trained(place, client), tmp_path / "out")
    images = str(tmp_path / "images")
    found = score(open_trained(tmp_path / "out"), images)[images]
    assert found == score(open_trained(place, client), images)[images]
    assert found["n"] == predict(open_trained(tmp_path / "out"), images, tmp_path / "out.csv") == 24


def test_the_commands(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["flexp", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    out, source = str(tmp_path / "out"), tmp_path / "in.csv"
    assert "a whole model (float32)" in call("export", str(run), "--client", "south", "--out", out)
    shown = call("evaluate", str(run), "--client", "south", "--pretrained")
    for word in ("south after round 1", "pretrained", "personal", OWN, EVERYBODY, "Accuracy"):
        assert word in shown
    found = json.loads(call("evaluate", out, "--run", str(run), "--json"))
    assert found["scores"]["personal"][OWN] == diary(run, 1)["personal"]
    source.write_text("text\nthe dog\n", encoding="utf-8")
    assert "1 rows labelled" in call("predict", out, "--data", str(source), "--out", str(tmp_path / "p.csv"))
    for wrong in (
        ["export", str(run), "--client", "south", "--out", out],
        ["export", str(run), "--client", "nobody", "--out", str(tmp_path / "new")],
        ["export", str(run), "--client", "south", "--out", str(tmp_path / "new"), "--merge", "--adapter"],
        ["evaluate", out],
    ):
        assert call(*wrong, code=2).startswith("flexp: ")
    assert not (tmp_path / "new").exists()
