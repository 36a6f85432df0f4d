from __future__ import annotations

import json
import uuid
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from flexp.config import DataConfig
from flexp.data.sources import read_rows, split_for_tests
from flexp.data.types import PLACE
from flexp.errors import DataError
from flexp.registry import TASKS

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
        assert (read.values("text"), read.values("label")) == (["a, b\nc", "NA"], ["1", "0"]), suffix
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


def test_whoever_names_a_place_for_tests_means_its_tests(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a\n1\n")
    for name in ("train", "test"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / f"{name}.csv").write_text("a\n1\n")
    found = [split_for_tests(str(tmp_path / name)) for name in ("x.csv", "both", "both#train", "nothing.csv")]
    assert found == [None, "test", None, None]
    assert [split_for_tests(name) for name in ("owner/name", "owner/name#train", "asset:sentiment")] == [
        "test",
        None,
        None,
    ]


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
        ("x.jsonl", '{"a": 1}\n{"a": "b"}\n', r"x.jsonl, line 2: the column 'a' mixes kinds .*text after a number"),
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


IDENTITIES = [
    "007",
    "7",
    "01",
    "1",
    "1e5",
    "100000",
    "9223372036854775808",
    "9223372036854775809",
    "true",
    "True",
    "1.0",
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "xlsx"])
def test_identities_are_text_as_written(tmp_path: Path, suffix: str) -> None:
    """No format guesses types: what differs on paper differs here. The truth is pandas' reading as text."""
    table = pd.DataFrame({"client": IDENTITIES, "text": "x"})
    path = tmp_path / f"x.{suffix}"
    if suffix in ("csv", "tsv"):
        table.to_csv(path, index=False, sep="," if suffix == "csv" else "\t")
        assert pd.read_csv(path, dtype=str, sep="," if suffix == "csv" else "\t")["client"].tolist() == IDENTITIES
    elif suffix == "parquet":
        table.to_parquet(path)
    elif suffix == "xlsx":
        table.to_excel(path, index=False)
    else:
        table.to_json(path, orient="records", lines=suffix == "jsonl")
    rows = read_rows(str(path))
    assert rows.values("client") == IDENTITIES
    assert [row["client"] for row in rows.take(range(len(rows)), ["client"])] == IDENTITIES


def test_numbers_of_json_and_types_of_parquet_are_written_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"a": 007}\n'.replace("007", "1e5") + '{"a": 100000}\n{"a": 18446744073709551617}\n'
    )
    assert read_rows(str(tmp_path / "x.jsonl")).values("a") == ["1e5", "100000", "18446744073709551617"]
    (tmp_path / "b.jsonl").write_text('{"a": true, "b": [1, 2.50]}\n{"a": false, "b": []}\n{"b": null}\n')
    rows = read_rows(str(tmp_path / "b.jsonl"))
    assert (rows.values("a"), rows.values("b")) == (["true", "false", None], [["1", "2.50"], [], None])
    (tmp_path / "n.jsonl").write_text('{"a": NaN}\n{"a": 1}\n')  # as Python writes a gap
    assert read_rows(str(tmp_path / "n.jsonl")).values("a") == [None, "1"]
    typed = pa.table(
        {
            "whole": pa.array([7, None], pa.int64()),
            "gaps": pa.array([7.0, None], pa.float64()),  # whole numbers beside a gap, as pandas stores them
            "flag": pa.array([True, False]),
            "coded": pa.array(["x", "y"]).dictionary_encode(),
            "view": pa.array(["x", "y"], pa.string_view()),
            "large": pa.array(["x", "y"], pa.large_string()),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "id": pa.array([uuid.UUID(int=7).bytes] * 2, pa.uuid()),
        }
    )
    pa.parquet.write_table(typed, tmp_path / "t.parquet")
    rows = read_rows(str(tmp_path / "t.parquet"))
    assert (rows.values("whole"), rows.values("gaps")) == (["7", None], ["7", None])
    assert rows.values("flag") == ["true", "false"]
    assert rows.values("id") == [str(uuid.UUID(int=7))] * 2
    assert rows.values("coded") == rows.values("view") == rows.values("large") == ["x", "y"]


def test_tables_as_europe_writes_them(tmp_path: Path) -> None:
    """Semicolons, Windows-1252 and UTF-16; what was guessed is said."""
    frame = pd.DataFrame({"Straße": ["Käse; alt", "1,5"], "name": ["a", "b"]})
    for encoding, told in (("latin-1", "Windows-1252"), ("utf-16", "UTF-16"), ("utf-8-sig", None), ("utf-8", None)):
        frame.to_csv(tmp_path / "x.csv", sep=";", index=False, encoding=encoding)
        rows = read_rows(str(tmp_path / "x.csv"))
        assert rows.values("Straße") == frame["Straße"].tolist(), encoding
        (note,) = rows.notes
        assert "columns divided by ';'" in note
        assert told is None or told in note
    (tmp_path / "x.csv").write_text("text,label\na; b,1\n")
    assert (read_rows(str(tmp_path / "x.csv")).values("text"), read_rows(str(tmp_path / "x.csv")).notes) == (
        ["a; b"],
        [],
    )


@pytest.mark.parametrize(
    "content",
    ["sep=;\ntext;label\na,b;1\n", "text, short;label\na b;1\n", "text|label\na;b,c|1\n", "text\tlabel\n1,5;\t1\n"],
)
def test_the_sign_that_divides_columns_is_found(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.csv").write_text(content)
    rows = read_rows(str(tmp_path / "x.csv"))
    assert rows.dataset.column_names[1:] == ["label"]
    assert rows.values("label") == ["1"]
    assert rows.notes[0].startswith("x.csv: read as columns divided by")


def test_a_sign_is_found_in_front_of_long_texts_and_odd_line_ends(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["Wort, " * 3000, "a\u2028b", "c"] * 3, "label": "1"})
    frame.to_csv(tmp_path / "x.csv", sep=";", index=False)
    assert read_rows(str(tmp_path / "x.csv")).values("text") == frame["text"].tolist()


def test_the_first_sheet_of_a_workbook(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "reviews"
    for row in ([], ["text", "n", "when", "ok", None], [], ["ä", 7.0, 0.5, True], [None, "007", None, None, " "]):
        sheet.append(row)
    book.create_sheet("notes")
    book.save(tmp_path / "x.xlsx")
    rows = read_rows(str(tmp_path / "x.xlsx"))
    assert rows.take([0, 1], ["text", "n", "when", "ok"]) == [
        {"text": "ä", "n": "7", "when": "0.5", "ok": "true", PLACE: "x.xlsx, row 4"},
        {"text": None, "n": "007", "when": None, "ok": None, PLACE: "x.xlsx, row 5"},
    ]
    assert rows.notes == ["x.xlsx: read the sheet 'reviews', the first visible of 2"]
    sheet.sheet_state = "hidden"
    book["notes"].append(["seen"])
    book["notes"].append(["x"])
    book.save(tmp_path / "h.xlsx")
    assert read_rows(str(tmp_path / "h.xlsx")).values("seen") == ["x"]
    for name, cells, message in (
        ("sum", [["a"], ["x"], ["=1+1"]], "sum.xlsx, row 3: the formula '=1\\+1' has no result in the file"),
        ("wrong", [["a"], ["x"], ["#N/A"]], "wrong.xlsx, row 3: a cell holds the error #N/A"),
        ("gap", [["text", None], ["a", "b"]], "gap.xlsx, row 1: column 2 has no name"),
        ("twice", [["a", "a"], ["a", "b"]], "twice.xlsx: has more than one column 'a'"),
        ("empty", [], "empty.xlsx: the sheet 'Sheet' is empty"),
    ):
        book = openpyxl.Workbook()
        for row in cells:
            book.active.append(row)
        book.save(tmp_path / f"{name}.xlsx")
        with pytest.raises(DataError, match=message):
            read_rows(str(tmp_path / f"{name}.xlsx"))


@pytest.mark.parametrize("start", ["", "\n", "\r\n\n"])
def test_empty_lines_before_a_table_change_nothing(tmp_path: Path, start: str) -> None:
    """Types were guessed after one, so that 007 and 7 were one client."""
    (tmp_path / "x.csv").write_text(f"{start}id,label\n007,01\n7,1\n", newline="")
    rows = read_rows(str(tmp_path / "x.csv"))
    assert (rows.values("id"), rows.values("label")) == (["007", "7"], ["01", "1"])


def test_lines_that_a_lone_quotation_mark_swallows_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('text\tlabel\n"It was good\tpos\nnice" she\tneg\nbad\tneg\n')
    assert "1 cells with line ends and tabs" in read_rows(str(tmp_path / "x.tsv")).notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"\na,b,a\n1,2,3\n", r"x.csv: has more than one column 'a'"),
        ("x.xlsx", b"no", r"x.xlsx: is not an Excel workbook"),
        ("x.csv", b"a,b,a\n1,2,3\n", r"x.csv: has more than one column 'a'"),
        ("x.jsonl", b'{"a": "x"}\n{"a": "\\ud83d"}\n', r"x.jsonl, line 2: the column 'a' holds half of a character"),
        ("x.jsonl", b'{"a": "7"}\n{"a": 7}\n', r"x.jsonl, line 2: the column 'a' mixes kinds"),
        ("x.jsonl", '{"a": "ä"}\n'.encode("latin-1"), r"is not UTF-8 text"),
        ("x.jsonl", b'{"a": "x", "a": "y"}\n', r"x.jsonl, line 1: .*one object has two values for 'a'"),
        ("x.csv", b"a\n\x81\n", r"x.csv: is neither UTF-8 nor Windows-1252 text \(byte 2\)"),
        ("x.csv", b"a,b\nx,1\ny\x00z,2\n", r"x.csv, line 3: holds a zero byte"),
        (
            "x.csv",
            "a,b\nx,1\n".encode("utf-16-le"),
            r"x.csv, line 1: holds a zero byte, .*UTF-16 without its mark; save",
        ),
        ("x.txt", b"x\ny\x00z\n", r"x.txt, line 2: holds a zero byte"),
        ("x.csv", "a\nä\nöü\n".encode() + b"\xe4\n", r"x.csv, line 4: is no longer UTF-8 text at byte 10"),
        ("x.csv", "a\nПривет, мир\n".encode("cp1251"), r"x.csv: is not UTF-8, and would read 'Ïðèâåò' as Windows"),
        ("x.csv", "a\n中文很好\n".encode("gbk"), r"x.csv: is not UTF-8, and would read 'ÖÐÎÄºÜºÃ' as Windows"),
        ("x.csv", b"text;label;note\na;1;x\nb;2\n", r"x.csv: is not a well-formed table \(.*Expected 3 columns, got 2"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"), 2),
        (("reviews_train", "reviews_test", "reviews_val"), 1),
        (("north", "south", "dev"), 2),
        (("training", "evaluation"), 1),
        (("contest", "latest"), 2),  # words, not letters
    ],
)
def test_what_is_called_test_never_joins_training(tmp_path: Path, files: tuple[str, ...], taken: int) -> None:
    for folder in (tmp_path, tmp_path / "clients" / "hill"):
        for name in files:
            jsonl(folder / f"{name}.jsonl", [{"text": name}])
    assert len(read_rows(str(tmp_path))) == taken
    assert len(read_rows(str(tmp_path / "clients"), by_file=True)) == taken


@pytest.mark.parametrize("name", ["test-00000-of-00001.jsonl", "dev.jsonl", "validation/rows.jsonl"])
def test_what_is_called_test_is_no_client(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "north.jsonl", [{"text": "a"}])
    jsonl(tmp_path / name, [{"text": "b"}])
    with pytest.raises(DataError, match=r"split by its name, but clients.by = \"file\".*data.test_source"):
        read_rows(str(tmp_path), by_file=True)


def test_files_of_one_name_are_not_one_client(tmp_path: Path) -> None:
    for name in ("north.jsonl", "north.json"):
        (tmp_path / name).write_text('[{"text": "a"}]' if name == "north.json" else '{"text": "a"}')
    with pytest.raises(DataError, match=r"north.json and north.jsonl are both the client 'north' by their names"):
        read_rows(str(tmp_path), by_file=True)


def test_what_a_folder_holds_beside_its_rows_is_said(tmp_path: Path) -> None:
    jsonl(tmp_path / "tables" / "a.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "tables" / "test.jsonl", [{"text": "a"}])  # left out by its name
    (tmp_path / "tables" / "b.xls").touch()
    assert read_rows(str(tmp_path / "tables")).notes == [f"{tmp_path / 'tables'}: nothing is read of b.xls"]
    for name in ("cat/1.png", "cat/2.heic", "dog/2024/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    photos = tmp_path / "photos"
    assert read_rows(str(photos)).notes == [
        f"{photos / 'cat'}: nothing is read of 2.heic; {photos}: nothing is read of dog"
    ]


def test_a_folder_of_tests_alone_is_refused(tmp_path: Path) -> None:
    jsonl(tmp_path / "test-00000-of-00001.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"test-00000-of-00001.jsonl are not for training by their names"):
        read_rows(str(tmp_path))
    assert len(read_rows(str(tmp_path), "test")) == 1


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


@pytest.mark.parametrize(
    ("written", "read"),
    [(["3,5", "4", "-0,25"], True), (["1,234", "2,5"], True), (["1,234", "5,678"], False), (["1,234.5", "2"], False)],
)
def test_decimal_commas_are_numbers_where_they_can_be_nothing_else(
    tmp_path: Path, written: list[str], read: bool
) -> None:
    (tmp_path / "x.csv").write_text("y;text\n" + "".join(f"{value};a\n" for value in written))
    values = read_rows(str(tmp_path / "x.csv")).values("y")
    config = DataConfig(source="x", task="regression", label="y")
    if read:
        right = pd.read_csv(tmp_path / "x.csv", sep=";", decimal=",")["y"].tolist()
        assert TASKS["regression"].read_labels(values, None, config, str) == right
    else:
        with pytest.raises(DataError, match="is no number; write numbers with a point"):
            TASKS["regression"].read_labels(values, None, config, str)
