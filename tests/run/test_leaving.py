"""A client that waits for a server which has gone, and is stopped or gives up, keeps all that it has done; and what a
server refuses whose run is another one than the client means."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexp.config import DeploymentConfig, RunConfig
from flexp.errors import LinkError, LinkLostError
from flexp.links.asking import PullRequest
from flexp.links.base import Link, finished
from flexp.links.messages import BackwardRequest, Ready
from flexp.links.wrapping import Wrapping
from flexp.run.client import run_client
from flexp.run.settle import settle_client
from flexp.run.store import Store
from tests.harness import equal
from tests.tiny import bert_folder

from .test_fleet import InProcess, configured
from .tools import newest, without_meters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("losing")
    bert_folder(place / "model", dropout=True)
    return place


class Lossy(Wrapping):
    """Loses the answer to the last of a step's requests of one kind, and with it the link, for good."""

    def __init__(self, inner: Link, lost: type[Any], step: int) -> None:
        super().__init__(inner)
        self._lost, self._step, self.broken = lost, step, False

    def call(self, request: Any) -> Future[Any]:
        answer = super().call(request)
        last = getattr(request, "exchange", 0) & 0xFFFF in (0, 2)  # of two micro-batches
        at = request.steps if isinstance(request, Ready) else getattr(request, "step", -1)
        self.broken = self.broken or (isinstance(request, self._lost) and at == self._step and last)
        return finished(_gone) if self.broken else answer


def _gone() -> Any:
    raise LinkLostError("the link was lost")


class Session:
    """One client, what it says, and its server; its link breaks for good at a request of the kind ``lost`` in ``step``.
    Who has much patience is asked to stop while it tries to reach the server again."""

    def __init__(self, config: RunConfig, folder: Path, schedule: str, patience: float = 300.0) -> None:
        table = {"schedule": schedule, "clients": ["south"], "save_every": 100, "patience": patience}
        self.config, self.asked = config, DeploymentConfig.model_validate(table)
        self.server, self.state = InProcess(config, self.asked, folder / "server"), folder / "south"
        self.text = ""

    def run(self, lost: type[Any] | None = None, step: int = 0, cut: tuple[int, int] | None = None) -> bool:
        stop, links = threading.Event(), list[Lossy]()

        def reach() -> Link:
            if links and links[0].broken:
                if self.asked.patience > 100:
                    stop.set()
                raise LinkLostError("nobody is there")
            links.append(Lossy(self.server.server.connect("south"), lost or Ready, step if lost else -2))
            return links[-1]

        console = Console(file=io.StringIO(), width=400)
        try:
            setup, codec = settle_client(self.config, "south", cut), self.config.link.codec
            return run_client(setup, self.asked, reach, self.state, console=console, stop=stop, codec=codec)
        finally:
            self.text = console.file.getvalue()  # type: ignore[attr-defined]

    def end(self) -> list[dict[str, Any]]:
        """What the server and the client end with."""
        self.server.end()
        return [without_meters(newest(place)) for place in (self.state.parent / "server", self.state / "snapshots")]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    @lru_cache
    def ended(schedule: str) -> list[dict[str, Any]]:
        session = Session(configured(folder, steps=4), folder / schedule, schedule)
        assert session.run()
        return session.end()

    return ended


@pytest.mark.parametrize(
    ("schedule", "lost", "done", "patience"),
    [
        pytest.param("free", BackwardRequest, 3, 300.0, id="free: the server has applied a step, the client has not"),
        pytest.param("free", PullRequest, 4, 0.3, id="free: a step is done but for its pull, and patience runs out"),
        pytest.param("free", Ready, 4, 300.0, id="free: between two steps"),
        pytest.param("deterministic", BackwardRequest, 3, 300.0, id="deterministic: the server alone has applied it"),
        pytest.param("deterministic", PullRequest, 4, 300.0, id="deterministic: done but for its pull"),
    ],
)
def test_nothing_is_lost_or_done_twice(
    folder: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], list[dict[str, Any]]],
    schedule: str,
    lost: type[Any],
    done: int,
    patience: float,
) -> None:
    """Nor does the run end with other weights than if the link had held."""
    session = Session(configured(folder, steps=4), tmp_path, schedule, patience)
    if patience > 100:
        assert session.run(lost, 4) is False
        assert "south: stopped while the server could not be reached (nobody is there)" in session.text
        assert f"south: stopped after {done} steps; snapshot" in session.text
        assert "within 300 s" not in session.text
    else:
        with pytest.raises(LinkError, match=r"could not be reached within 0\.3 s .*: it goes on from snapshot \d+ in "):
            session.run(lost, 4)
    saved = Store(session.state / "snapshots")
    assert saved.open(max(saved.numbers())).facts["steps"] == done
    assert session.run()
    server = session.server.server
    assert server.clients["south"].progress.newest == server.shared.version == 8
    for one, other in zip(undisturbed(schedule), session.end(), strict=True):
        assert equal(one, other)


def test_who_had_no_order_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    session = Session(configured(folder), tmp_path, "free", patience=0.3)
    with pytest.raises(LinkError, match=r"could not be reached within 0\.3 s .*when it is back$"):
        session.run(Ready, 0)
    assert Store(session.state / "snapshots").numbers() == []


def test_a_deterministic_run_takes_no_other_cut_whatever_the_clients_file_says(folder: Path, tmp_path: Path) -> None:
    """And leaves what the client has as it is."""
    session = Session(configured(folder), tmp_path, "deterministic")
    session.asked = DeploymentConfig(save_every=100)  # of a client whose file says nothing of the schedule
    assert session.run(Ready, 2) is False

    def kept() -> list[bytes]:
        files = [*(session.state / "snapshots").rglob("checkpoint*/*"), session.state / "client.json"]
        return [file.read_bytes() for file in sorted(files)]

    before = kept()
    with pytest.raises(
        LinkError, match=r"another cut than in its snapshots.*in a free run only; start it with the cut"
    ):
        session.run(cut=(3, 4))
    assert kept() == before
    assert session.run()


@pytest.mark.parametrize("rounds", [1, 3])
def test_another_number_of_steps_is_refused_before_the_first(folder: Path, tmp_path: Path, rounds: int) -> None:
    """Also where no learning rate falls: after days of training it would be too late."""
    session = Session(configured(folder), tmp_path, "free")
    ours = session.config.train
    assert ours.personal.schedule == "constant"
    session.config = session.config.model_copy(update={"train": ours.model_copy(update={"rounds": rounds})})
    with pytest.raises(LinkError, match=rf"client south plans {2 * rounds} steps, and this run has 4, so it would end"):
        session.run()
    assert session.server.server.shared.version == 0
    assert Store(session.state / "snapshots").numbers() == []
