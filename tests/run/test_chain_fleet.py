"""What the servers of a chain agree on before and after a fall. (Whole runs are in ``test_killed.py``.)"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flexp.config import DeploymentConfig
from flexp.errors import ConfigError, LinkError, StorageError
from flexp.run.chaining import take_place
from flexp.run.conduct import Conductor
from flexp.run.server import make_conductor, make_server
from tests import tiny

NAMES = list(tiny.CLIENTS)


def snapshots(folder: Path) -> int:
    return max((int(place.name[-8:]) for place in folder.glob("checkpoint-*")), default=-1)


def test_a_first_server_that_falls_before_its_own_snapshot_is_back_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers further on have saved already; without an operator all go on from the newest that all have."""
    tiny.bert_folder(tmp_path / "model")
    config = tiny.config(tmp_path)

    def risen() -> Conductor:
        reach, made = None, None
        for name, blocks, url in (
            ("tail", (3, 4), None),
            ("middle", (2, 3), "grpc://x:1"),
            ("head", (1, 2), "grpc://x:1"),
        ):
            deployment = DeploymentConfig(schedule="deterministic", clients=NAMES, keep=1, blocks=blocks, next=url)
            made = make_server(config, 1, 4, "sequence-classification", NAMES, deployment=deployment)
            take_place(made, config, deployment, tmp_path / name, reach, lines.append)
            reach = made.connect
        assert made is not None
        return make_conductor(made, config, deployment, tmp_path / "head", lines.append)

    def fall(conductor: Conductor, number: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(conductor.snapshots, "save", lambda *_: (_ for _ in ()).throw(StorageError("killed")))
            conductor.save(number)

    lines: list[str] = []
    began = risen()
    fall(began, 2)
    assert [snapshots(tmp_path / name) for name in ("head", "middle", "tail")] == [-1, 2, 2]
    again = risen()
    assert (again.run, again.numbers) == (began.run, [])
    again.save(2)
    fall(again, 3)
    fall(again, 4)  # others keep what it has, however often it cannot save
    last = risen()
    assert (last.run, last.numbers) == (began.run, [2])
    last.restore(2)
    shutil.rmtree(tmp_path / "head")
    with pytest.raises(LinkError, match=f"state is of the run {began.run}, the server before goes on with "):
        risen()


def test_blocks_that_nobody_has_are_refused(tmp_path: Path) -> None:
    tiny.bert_folder(tmp_path / "model")
    config = tiny.config(tmp_path)
    for blocks, next_server, why in (
        ((1, 3), None, r"blocks are \[1, 3\), and nobody has those behind them: name .* --next"),
        ((2, 4), "grpc://localhost:1", r"blocks are \[2, 4\), the last: leave out --next"),
        ((2, 5), None, r"--blocks 2:5 \(deployment.blocks\) are no blocks of the shared ones, which are \[1, 4\)"),
    ):
        with pytest.raises(ConfigError, match=why):
            make_server(
                config, 1, 4, "sequence-classification", None,
                deployment=DeploymentConfig(blocks=blocks, next=next_server),
            )  # fmt: skip
