from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from flexp.data.sources import read_rows
from flexp.errors import DataError

from .tools import jsonl


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    rows = [{"text": "a, b\nc", "label": 1}, {"text": "NA", "label": 0}]
    jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.csv").write_text('text,label\n"a, b\nc",1\nNA,0\n')
    (tmp_path / "x.tsv").write_text('text\tlabel\n"a, b\nc"\t1\nNA\t0\n')
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        read = read_rows(str(tmp_path / f"x.{suffix}"))
        assert (read.values("text"), read.values("label")) == (["a, b\nc", "NA"], [1, 0]), suffix
    assert read_rows(str(tmp_path / "x.jsonl")).place(1) == "x.jsonl, line 2"
    assert read_rows(str(tmp_path / "x.csv")).place(1) == "x.csv, row 2"


def test_text_files_have_paragraphs_or_else_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\none\ntwo\n\n\nthree\n")
    (tmp_path / "l.txt").write_text("one\ntwo\n")
    assert read_rows(str(tmp_path / "p.txt")).values("text") == ["one\ntwo", "three"]
    assert read_rows(str(tmp_path / "l.txt")).values("text") == ["one", "two"]
    assert read_rows(str(tmp_path / "p.txt")).place(1) == "p.txt, line 6"


def test_class_labels_survive_in_parquet(tmp_path: Path) -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["low", "high"])})
    datasets.Dataset.from_dict({"label": [1, 0]}, features=features).to_parquet(tmp_path / "x.parquet")
    assert read_rows(str(tmp_path / "x.parquet")).class_names("label") == ["low", "high"]


def test_a_folder_is_one_table_or_a_client_per_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "north.jsonl", [{"text": "x"}] * 2)
    jsonl(tmp_path / "south" / "1.jsonl", [{"text": "y"}])
    jsonl(tmp_path / "south" / "2.jsonl", [{"text": "z"}])
    read = read_rows(str(tmp_path), by_file=True)
    assert [read.part(k).group for k in range(4)] == ["north", "north", "south", "south"]
    assert read.place(3) == "2.jsonl, line 1"
    assert len(read_rows(str(tmp_path))) == 2


def test_splits_of_a_folder(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": "x"}] * 3)
    jsonl(tmp_path / "test.jsonl", [{"text": "y"}])
    assert len(read_rows(str(tmp_path))) == 3
    assert len(read_rows(str(tmp_path), "test")) == len(read_rows(f"{tmp_path}#test")) == 1
    with pytest.raises(DataError, match=r"there is no split 'dev'; it holds test.jsonl, train.jsonl"):
        read_rows(str(tmp_path), "dev")


def test_image_folders(tmp_path: Path) -> None:
    for client in ("a", "b"):
        for label in ("cat", "dog"):
            (tmp_path / client / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / client / label / "1.png")
    one = read_rows(str(tmp_path / "a"))
    assert (one.values("label"), one.place(1)) == (["cat", "dog"], f"{tmp_path / 'a' / 'dog'}, image 1")
    both = read_rows(str(tmp_path), by_file=True)
    assert [both.part(k).group for k in range(4)] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{oops\n', r"x.jsonl, line 2: is not JSON .*write one object a line"),
        ("x.jsonl", '{"a": 1}\n\n[1]\n', r"x.jsonl, line 3: holds list instead of an object"),
        ("x.jsonl", '{"a": 1}\n{"a": "b"}\n', r"x.jsonl, line 2: the column 'a' mixes kinds .*str after int"),
        ("x.jsonl", "", r"x.jsonl: holds no rows"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x.csv: is not a well-formed table \(.*Expected 2 columns, got 3"),
        ("x.csv", "", r"x.csv: is empty; its first line must name the columns"),
        ("x.parquet", "no", r"x.parquet: is not a Parquet file"),
        ("x.json", '{"a": 1}', r"x.json: holds dict instead of a list"),
        ("x.xls", "a", r"x.xls: the format '.xls' is not known; use .csv, .tsv"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def test_what_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"a": "ä"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_rows(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.csv").write_bytes("a,b\nx,1\nä,2\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x.csv, row 2: the column 'a' is not UTF-8 text; save the file as UTF-8"):
        read_rows(str(tmp_path / "x.csv"))
    (tmp_path / "x.csv").write_bytes("ä,b\nx,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"x.csv: is not UTF-8 text"):
        read_rows(str(tmp_path / "x.csv"))


def test_missing_sources_and_wrong_kinds(tmp_path: Path) -> None:
    jsonl(tmp_path / "reviews.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"no such file or folder .*did you mean 'reviews.jsonl'"):
        read_rows(str(tmp_path / "review.jsonl"))
    with pytest.raises(DataError, match=r'is a single file, but clients.by = "file" needs a folder'):
        read_rows(str(tmp_path / "reviews.jsonl"), by_file=True)
    (tmp_path / "empty" / "clinic").mkdir(parents=True)
    with pytest.raises(DataError, match="the client 'clinic' is empty"):
        read_rows(str(tmp_path / "empty"), by_file=True)
    with pytest.raises(DataError, match="holds neither data files"):
        read_rows(str(tmp_path / "empty"))


def test_a_datasets_id_goes_to_the_library_and_its_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        if args[0] == "nobody/nothing":
            raise ConnectionError("no\nnetwork")
        return datasets.Dataset.from_dict({"text": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("some/set", None, "plain").place(1) == "some/set[train], row 2"
    assert asked == [(("some/set", "plain"), {"split": "train"})]
    with pytest.raises(DataError, match=r"nobody/nothing: .* cannot be loaded as a datasets id .*: no network"):
        read_rows("nobody/nothing#test")
    assert asked[-1][1] == {"split": "test"}


def test_assets_are_resolved_by_their_own_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flexp.assets

    path = jsonl(tmp_path / "x.jsonl", [{"text": "x"}])
    monkeypatch.setattr(flexp.assets, "resolve", lambda reference: path if reference == "asset:mine" else None)
    assert read_rows("asset:mine").values("text") == ["x"]
