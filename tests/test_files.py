"""Names that become folders, and files that are not written over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexp.comparison.compare import compare
from flexp.errors import ConfigError
from flexp.files import check_free, check_new, folder_name
from flexp.links.grpc.tokens import issue, read_tokens
from flexp.run import runner
from flexp.run.fleet import Fleet
from flexp.run.settle import settle
from tests.comparison.tools import comparison
from tests.data.tools import jsonl, labelled
from tests.tiny import bert_folder, config

ODD = ("..", ".", "../../../escaped", "/etc/passwd", "a/b", "a\\b", "C:x", "", " ", "a.", "-rf", "~", "n" * 300, "\0x")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12) | st.sampled_from(ODD))
def test_a_folders_name_leads_nowhere(name: str) -> None:
    found = folder_name(name)
    assert os.path.normpath(f"/x/{found}") == f"/x/{found}"
    assert "/" not in found
    assert 0 < len(found) <= 60
    assert not found.startswith((".", "-", " "))
    assert found.isascii()
    assert found.isprintable()
    assert folder_name(found + "x") != found


def test_names_stay_apart_and_plain_ones_are_themselves() -> None:
    for name in ("north", "clinic-a", "Lake_2", "a.x", "7", "007"):
        assert folder_name(name) == name
    odd = {name: folder_name(name) for name in (*ODD, "a b", "a-b", "a  b", folder_name("a b").replace("~", "-"))}
    assert len(set(odd.values())) == len(odd)


def test_a_fleet_stays_in_its_folder(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    base = config(tmp_path)
    names = ("../../../escaped", "..", "north")
    jsonl(tmp_path / "rows.jsonl", labelled(90, names))
    made = Fleet(settle(base), tmp_path / "fleet", schedule="free", save_every=1)
    folders = {name: made.folder(name) for name in names}
    assert folders["north"] == tmp_path / "fleet/clients/north"
    for name in names:
        assert folders[name].resolve().parent == (tmp_path / "fleet/clients").resolve()
        assert made.clients[name].log.parent == folders[name]


def test_a_token_is_of_a_name_and_of_no_path(tmp_path: Path) -> None:
    for name in ("../../evil", "..", ".", "/etc/passwd", "a/../b", "..\\evil", "a//b"):
        with pytest.raises(ConfigError, match="is a path; expected a client's name"):
            issue(tmp_path / "tokens", name)
    for name in ("clinic-a", "Köln / Ward 3", "a/b", "a..b"):
        assert issue(tmp_path / "tokens", name)
    assert len(read_tokens(tmp_path / "tokens")) == 4


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    check_new(None)
    check_new(tmp_path / "new.json", read=[mine])
    check_new(mine, force=True)
    for path, words in ((mine, "exists already"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=rf"--plot .*{words}"):
            check_new(path, "--plot")
    with pytest.raises(ConfigError, match="is what is read"):
        check_new(tmp_path / "x/../mine.json", force=True, read=[mine])
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        check_free(mine, (), "a run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "report.html", "plan.json", "events"])
def test_a_run_takes_no_folder_with_files_of_its_names(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    (out / "notes.txt").write_text("beside it is fine")
    with pytest.raises(ConfigError, match=rf"out holds {name}, which is not of a run; choose another --out"):
        runner.refuse_taken(out)
    (out / name).unlink()
    runner.refuse_taken(out)


def test_a_fleet_and_a_comparison_take_no_folder_of_others(tmp_path: Path) -> None:
    bert_folder(tmp_path / "model")
    for name in ("config.json", "table.md", "plan.json"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=r"holds config.json, which is not of a fleet; choose another --out"):
        Fleet(settle(config(tmp_path)), tmp_path / "out", schedule="free", save_every=1)
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds plan.json, which is not of a comparison; choose another --out"):
        compare(comparison(tmp_path, {"methods": ["local"], "seeds": 1, "tune": False}), tmp_path / "out", 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.md", "plan.json"}
