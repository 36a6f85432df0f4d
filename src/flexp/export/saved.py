"""A finished or stopped run, opened to use its personal models. Nothing in its folder changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexp.config import RunConfig
from flexp.config.loading import validate
from flexp.data.columns import nearest
from flexp.data.types import ClientData
from flexp.errors import ConfigError, StorageError
from flexp.files import read_json
from flexp.methods.base import Method, World, method_of
from flexp.methods.split import Split
from flexp.report.metrics import read
from flexp.report.summary import Scores, best_round, picked_on, scores_by_round
from flexp.run import checkpoints
from flexp.run.costs import MemoryProbes
from flexp.run.folder import is_client
from flexp.run.participants import place
from flexp.run.settle import world_of

LAST, BEST = "last", "best"


@dataclass(frozen=True)
class SavedRun:
    """A run as it was after one of its rounds.

    Attributes:
        round: whose checkpoint was loaded.
        scored: by round, every client's scores, of the rounds in which all were scored.
    """

    folder: Path
    config: RunConfig
    world: World
    method: Method
    round: int
    scored: dict[int, Scores]

    @property
    def picked_on(self) -> str | None:
        """The data that this round was the best on, where it was: ``validation``, else ``test``."""
        best = best_round(self.scored, self.world.federation.task.higher_is_better)
        return picked_on(self.scored) if best == self.round else None

    def cut(self, client: str) -> tuple[int, int]:
        """Where a client cut then; it may have moved since the run began."""
        return self.method.cut_of(client) if isinstance(self.method, Split) else self.world.cuts[client]

    def client(self, name: str | None) -> ClientData:
        """The data of the client ``name``; of the only one, if there is no other.

        Raises:
            ConfigError: there is no such client, or none was named.
        """
        return client_of(self.world, name)


def client_of(world: World, name: str | None) -> ClientData:
    """See :meth:`SavedRun.client`."""
    clients = {data.name: data for data in world.federation.clients}
    if name is None and len(clients) == 1:
        return next(iter(clients.values()))
    known = ", ".join(repr(client)[:60] for client in list(clients)[:16]) + (" ..." if len(clients) > 16 else "")
    if name is None:
        raise ConfigError(f"say whose model with --client; the run has {known}")
    if name not in clients:
        raise ConfigError(f"the run has no client {name!r}{nearest(name, clients)}; it has {known}")
    return clients[name]


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run; an exported model and a client's folder have a ``config.json``, too."""
    return (folder / "metrics.jsonl").is_file() and (folder / "config.json").is_file() and not is_client(folder)


def run_config(folder: Path) -> RunConfig:
    """The configuration of the run in ``folder``.

    Raises:
        StorageError: there is none.
    """
    if is_client(folder):
        raise StorageError(
            f"{folder} holds one client's part of a run on several machines, and this needs all of a run; with "
            "--server URL it can be exported and used"
        )
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}; expected that of a run, as flexp run leaves it")
    if not is_run(folder):
        raise StorageError(
            f"{folder} holds no run: expected its config.json and metrics.jsonl, as flexp run leaves them"
        )
    return validate(read_json(folder / "config.json"), str(folder / "config.json"))


@dataclass(frozen=True)
class Opened:
    """A run's configuration, what it starts from, and one of its checkpoints, which was not read yet."""

    folder: Path
    config: RunConfig
    world: World
    scored: dict[int, Scores]
    number: int
    place: Path


def look_into(folder: Path, which: str = LAST) -> Opened:
    """Rebuild what a run starts from, and find a checkpoint.

    Args:
        which: ``last``, ``best`` (on validation data, where there is some, else on test data), or a round's number.

    Raises:
        StorageError: ``folder`` holds no run, or the checkpoint is not there.
        FlexpError: model or data are not what they were.
    """
    config = run_config(folder)
    found = checkpoints.kept(folder / "checkpoints")
    if not found:
        why = "output.checkpoint_every = 0 keeps none" if not config.output.checkpoint_every else "it stopped too early"
        raise StorageError(f"{folder} has no checkpoint ({why}), so its personal models are not there; run it again")
    world = world_of(folder, config)
    names = [client.name for client in world.federation.clients]
    task = world.federation.task
    scored = scores_by_round(read(folder / "metrics.jsonl"), names, task.metric)
    number = _round(which, max(found), best_round(scored, task.higher_is_better))
    if number not in found:
        there = ", ".join(str(known) for known in found)
        raise StorageError(
            f"{folder} has no checkpoint of round {number}; it has those of round {there} (a run keeps its last two, "
            "and with data.validation_fraction the best)"
        )
    world, _ = place(world, MemoryProbes(world, folder))
    return Opened(folder, config, world, scored, number, found[number])


def open_run(folder: Path, which: str = LAST) -> SavedRun:
    """Rebuild a run from its configuration and load a checkpoint, as a resumption would.

    Args:
        which: see :func:`look_into`.

    Raises:
        StorageError: ``folder`` holds no run, or the checkpoint is not there or does not fit.
        FlexpError: model or data are not what they were.
    """
    opened = look_into(folder, which)
    _, state = checkpoints.load(opened.place)
    method = method_of(opened.config)(opened.world)
    odd = sorted(method.state().keys() ^ state.keys())
    if odd:
        raise StorageError(
            f"{opened.place}: {odd[0]} is in the checkpoint or in the data, not in both; the clients must be those of "
            "the run: put data.source back as it was"
        )
    method.load(state)
    return SavedRun(folder, opened.config, opened.world, method, opened.number, opened.scored)


def _round(which: str, last: int, best: int | None) -> int:
    if which == LAST:
        return last
    if which == BEST:
        if not best:
            raise StorageError("no trained round was scored yet, so there is no best one; use --round last")
        return best
    if not which.isdecimal():
        raise ConfigError(f"--round {which}: expected a round's number, last or best")
    return int(which)
