"""A client takes no order, and no end, that its own settings do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexp.config import DeploymentConfig
from flexp.errors import LinkError, StorageError
from flexp.links.messages import Order
from flexp.run.judging import judge, judge_end
from flexp.run.store import Store
from tests.tiny import config

from .tools import Client, Server, plain

MEETS = {"model": {"pooling": "mean"}, "method": {"meet": {"on": True}}}
AVERAGES = {"method": {"name": "split-fedavg"}}


@pytest.mark.parametrize(
    ("changes", "steps", "met", "count"),
    [(MEETS, 0, 0, 1), (AVERAGES, 2, 0, 2), (AVERAGES, 1, 0, 2)],
    ids=["meeting", "average", "over an average"],
)
def test_steps_where_all_meet_first_are_refused(
    tmp_path: Path, changes: dict[str, Any], steps: int, met: int, count: int
) -> None:
    own = config(tmp_path, **changes)
    step = Order("step", "run", 0, count=count)
    with pytest.raises(LinkError, match=r"steps after \d, and by this client's settings there is (meet 0|average 1)"):
        judge(step, own, steps, met, begun=steps > 0)
    judge(step, own, steps, met + 1, begun=True)


def test_an_end_before_all_is_done_is_refused(tmp_path: Path) -> None:
    plain_run, meets = config(tmp_path), config(tmp_path, **MEETS)
    most = plain_run.train.total_steps
    with pytest.raises(LinkError, match=f"has done 3 of the {most} steps that its settings say"):
        judge_end(plain_run, 3, 0, early=False)
    judge_end(plain_run, 3, 0, early=True)
    judge_end(plain_run, most, 0, early=False)
    for early in (False, True):
        with pytest.raises(LinkError, match=r"settings there is meet 1 before: set the same method\.name"):
            judge_end(meets, most, 1, early=early)
    judge_end(meets, most, 2, early=False)
    judge_end(config(tmp_path, **AVERAGES), 3, 0, early=True)


def test_a_client_whose_server_knows_no_average_says_so(home: Path) -> None:
    """It trained to the end alone, and nobody was told."""
    own = config(home, **AVERAGES)
    free = DeploymentConfig(schedule="free", clients=["north"])
    server = Server(config(home), free, home / "server")
    client = Client(own, free, "north", plain(server), home / "north")
    with pytest.raises(LinkError, match="there is average 1 before"):
        client.join()
    server.end()


def test_a_client_that_could_not_save_its_last_steps_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, free = config(home), DeploymentConfig(schedule="free", clients=["north"])
    save = Store.save

    def full(self: Store, number: int, *of: Any, **more: Any) -> None:
        if "north" in str(self.folder) and number:
            raise StorageError("the disk is full")
        save(self, number, *of, **more)

    monkeypatch.setattr(Store, "save", full)
    server = Server(own, free, home / "server")
    client = Client(own, free, "north", plain(server), home / "north")
    with pytest.raises(StorageError, match=f"north: its last {own.train.total_steps} steps are not saved"):
        client.join()
    server.end()
    assert server.lines[-1].startswith("stopped")
