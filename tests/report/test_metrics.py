from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.errors import StorageError
from flexp.report.metrics import Follower, MetricsLog, read, write_records

from . import synthetic


def test_every_record_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for number in range(3):
            log.write({"kind": "round", "round": number, "seconds": 1.5})
            assert len(read(path)) == number + 1
    assert path.read_text().count("\n") == 3


def test_what_is_not_a_number_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"kind": "step", "loss": math.nan, "more": [math.inf, {"x": -math.inf}], "client": "Zoë"})
    assert read(path) == [{"kind": "step", "loss": None, "more": [None, {"x": None}], "client": "Zoë"}]


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(min_value=1, max_value=400))
def test_a_kill_anywhere_loses_at_most_the_line_being_written(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    records = [{"kind": "step", "round": 1, "client": f"Zoë {n}", "step": n, "loss": n / 7} for n in range(12)]
    write_records(path, records)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    left = whole[:-cut].count(b"\n")
    assert read(path) == records[:left]
    with MetricsLog(path) as log:
        log.write({"kind": "round", "round": 1})
    assert read(path) == [*records[:left], {"kind": "round", "round": 1}]


def test_truncation_keeps_earlier_rounds_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    diary = synthetic.records(("a", "b"), rounds=4, steps=2)
    write_records(path, diary)
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "rou')
    with MetricsLog(path) as log:
        dropped = log.truncate_after(2)
        log.write({"kind": "step", "round": 3})
    kept = [record for record in diary if record["round"] <= 2]
    assert dropped == len(diary) - len(kept) > 0
    assert read(path) == [*kept, {"kind": "step", "round": 3}]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_with_nothing_to_drop_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_records(path, synthetic.records(("a",), rounds=1, steps=1))
    before = path.stat().st_ino
    with MetricsLog(path) as log:
        assert log.truncate_after(1) == 0
    assert path.stat().st_ino == before


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "round"}\nnonsense\n{"kind": "round"}\n')
    with pytest.raises(StorageError, match=r"metrics\.jsonl:2: is not a JSON object"):
        read(path)


def test_a_missing_diary_and_a_closed_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="expected the diary of a run"):
        read(tmp_path / "none.jsonl")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.close()
    log.close()
    with pytest.raises(StorageError, match="closed"):
        log.write({"kind": "round"})


def test_a_line_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write({"cut": (1, 4)})
    assert json.loads(path.read_text()) == {"cut": [1, 4]}


def test_a_follower_reads_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.new() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in follower.new()] == [1, 2]
    with path.open("ab") as file:
        file.write(b'ep": 3}\n')
    assert follower.new() == [{"step": 3}]
    path.write_bytes(b'{"step": 1}\n')  # cut short by whoever went back
    assert follower.new() == [{"step": 1}]
