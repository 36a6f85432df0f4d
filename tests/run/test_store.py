"""Snapshots are whole or not there, and the newest whole one is found."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from flexp.errors import StorageError
from flexp.run import store as module
from flexp.run.store import Snapshots


def test_the_last_few_are_kept_and_come_back(tmp_path: Path) -> None:
    here = Snapshots(tmp_path / "here", keep=2)
    assert here.numbers() == []
    assert here.newest_whole() is None
    for number in (3, 11, 7):
        here.save(number, {"value": torch.tensor(number), "other": torch.arange(4.0)[::2]}, {"run": "r"})
    assert here.numbers() == [7, 11]
    state, facts = here.load(7)
    assert int(state["value"]) == 7
    assert torch.equal(state["other"], torch.tensor([0.0, 2.0]))
    assert (facts["run"], facts["number"]) == ("r", 7)


def test_a_damaged_one_is_put_aside(tmp_path: Path) -> None:
    here = Snapshots(tmp_path)
    for number in (1, 2):
        here.save(number, {"value": torch.tensor(number)}, {})
    file = tmp_path / "snapshot-00000002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    with pytest.raises(StorageError, match="SHA-256 differs"):
        here.load(2)
    assert (here.newest_whole() or {})["number"] == 1
    assert here.numbers() == [1]
    assert (tmp_path / "snapshot-00000002.damaged").exists()


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Snapshots(tmp_path)
    here.save(1, {"value": torch.tensor(1)}, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(StorageError, match="the disk is full"):
        here.save(2, {"value": torch.tensor(2)}, {})
    assert Snapshots(tmp_path).numbers() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-00000001"]
