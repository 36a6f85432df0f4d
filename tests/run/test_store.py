"""Checkpoints are whole or not there, the newest whole one is found, and an index is not followed out of its folder."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.errors import StorageError
from flexp.run import store as module
from flexp.run.store import LOCK, ParkedOnDisk, Store

NAMES = ("server", "client-a/x", "client-../a", "client-a.x", "client-" + "n" * 300)


def value(number: int) -> dict[str, torch.Tensor]:
    return {"value": torch.tensor(number), "other": torch.arange(4.0)[::2]}


def test_the_last_few_are_kept_and_come_back(tmp_path: Path) -> None:
    here = Store(tmp_path / "here", keep=2)
    assert here.numbers() == []
    assert here.newest_whole() is None
    for number in (3, 11, 7):
        here.save(number, {"a": value(number)}, {"run": "r"})
    assert here.numbers() == [7, 11]
    found = here.open(7)
    assert found.facts == {"run": "r"}
    assert found.load("a", lambda name: name == "value") == {"value": torch.tensor(7)}
    assert torch.equal(here.load(7)["a"]["other"], torch.tensor([0.0, 2.0]))


def test_the_best_stays_however_old_it_is(tmp_path: Path) -> None:
    here = Store(tmp_path, keep=1)
    for number in (1, 2, 3):
        here.save(number, {"a": value(number)}, best=1)
    assert here.numbers() == [1, 3]
    here.save(4, {"a": value(4)})
    assert here.numbers() == [4]


def test_parties_may_be_called_what_no_file_can_be_called(tmp_path: Path) -> None:
    here = Store(tmp_path / "here")
    here.save(1, {name: value(number) for number, name in enumerate(NAMES)})
    assert {name: int(found["value"]) for name, found in here.load(1).items()} == {n: i for i, n in enumerate(NAMES)}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    with pytest.raises(StorageError, match="has nothing of client-b; it has client-"):
        here.open(1).load("client-b")


def test_a_damaged_one_is_quarantined_by_who_writes_there(tmp_path: Path) -> None:
    here = Store(tmp_path)
    for number in (1, 2):
        here.save(number, {"a": value(number)})
    file = tmp_path / "checkpoint-00000002" / "000-a.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(StorageError, match=r"SHA-256 differs\); delete the folder checkpoint-00000002"):
        here.load(2)
    newest = here.newest_whole()
    assert newest is not None
    assert (newest.number, here.numbers()) == (1, [1, 2])
    here.newest_whole(quarantine=True)
    assert here.numbers() == [1]
    assert (tmp_path / "checkpoint-00000002.quarantined").exists()


def test_one_party_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    here = Store(tmp_path)
    here.save(1, {"a": value(1), "b": value(2)}, {"run": "r"})
    before = (tmp_path / "checkpoint-00000001/001-b.safetensors").read_bytes()
    (tmp_path / "checkpoint-00000001/000-a.safetensors").unlink()
    here.replace(1, "a", value(9))
    assert int(here.load(1)["a"]["value"]) == 9
    assert here.open(1).facts == {"run": "r"}
    assert (tmp_path / "checkpoint-00000001/001-b.safetensors").read_bytes() == before
    with pytest.raises(StorageError, match="has nothing of c; it has a, b"):
        here.replace(1, "c", {})


def index(folder: Path, **changes: Any) -> None:
    file = folder / "checkpoint-00000001/checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "..", "link", 7])
def test_an_index_names_nothing_outside_of_its_folder(tmp_path: Path, name: str | int) -> None:
    """Else a checkpoint that came from elsewhere could have any file of this machine copied or loaded."""
    here = Store(tmp_path / "here")
    here.save(1, {"a": value(1), "b": value(2)})
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (here.folder / "checkpoint-00000001/link").symlink_to(tmp_path / "secret")
    parties = json.loads((here.folder / "checkpoint-00000001/checkpoint.json").read_text(encoding="utf-8"))["parties"]
    index(here.folder, parties={**parties, "a": {**parties["a"], "file": name}})
    for action in (lambda: here.open(1), lambda: here.load(1), lambda: here.replace(1, "b", {})):
        with pytest.raises(StorageError, match="is not what was saved"):
            action()
    assert here.newest_whole() is None


def test_other_versions_get_one_line_and_are_left_as_they_are(tmp_path: Path) -> None:
    here = Store(tmp_path / "new")
    here.save(1, {"a": value(1)})
    index(here.folder, version=3)
    (tmp_path / "older/round-00002").mkdir(parents=True)
    (tmp_path / "older/round-00002/checkpoint.json").write_text("{}", encoding="utf-8")
    for store, message in ((here, "is of version 3"), (Store(tmp_path / "older"), "saved by an older version")):
        with pytest.raises(StorageError, match=message) as caught:
            store.newest_whole(quarantine=True)
        assert "\n" not in str(caught.value)
    assert here.numbers() == [1]
    with pytest.raises(StorageError, match="saved by an older version"):
        Store(tmp_path / "older").claim()


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Store(tmp_path)
    here.save(1, {"a": value(1)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        here.save(2, {"a": value(2)})
    with pytest.raises(StorageError, match="the disk is full"):
        here.replace(1, "a", value(3))
    assert here.numbers() == [1]
    assert int(here.load(1)["a"]["value"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "checkpoint-00000001"]


def test_who_writes_there_removes_halves_and_sees_whether_it_can(tmp_path: Path) -> None:
    here = Store(tmp_path / "here")
    here.claim()
    half = tmp_path / "here/.checkpoint-00000004.0123abcd.part"
    half.mkdir()
    assert here.numbers() == []
    here.claim()
    assert [path.name for path in here.folder.iterdir()] == [LOCK]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another"):
        Store(tmp_path / "file").claim()
    with pytest.raises(StorageError, match="cannot be written"):
        Store(tmp_path / "file/in").claim()


def test_parked_blocks_are_one_runs(tmp_path: Path) -> None:
    parked = ParkedOnDisk(tmp_path, 1)
    assert parked.get(3) is None
    for block in (3, 1):
        parked.put(block, value(block))
    assert int((parked.get(3) or {})["value"]) == 3
    assert ParkedOnDisk(tmp_path, 2).get(3) is None


HOLDS = """
import sys, pathlib
from flexp.run.store import Store
store = Store(pathlib.Path(sys.argv[1]))
store.claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_save_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed holds nothing any more, and in one process nobody is kept off."""
    mine = Store(tmp_path / "here")
    mine.save(1, {"a": value(1)})
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(mine.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        for work in (mine.claim, lambda: mine.replace(1, "a", value(2))):
            with pytest.raises(StorageError, match="another process saves there"):
                work()
    finally:
        other.kill()
        other.communicate()
    assert int(mine.load(1)["a"]["value"]) == 1
    monkeypatch.undo()
    mine.claim()
    Store(mine.folder).claim()


def test_who_has_closed_it_keeps_nobody_off(tmp_path: Path) -> None:
    mine = Store(tmp_path)
    for _ in range(2):
        mine.claim()
    mine.close()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.communicate()[0] == b"claimed\n"


def test_who_has_just_left_is_waited_for(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"claimed\n"
    threading.Timer(0.5, other.kill).start()
    Store(tmp_path).claim()
    other.communicate()
