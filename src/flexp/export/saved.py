"""A finished or stopped run, opened to use its personal models. Nothing in its folder changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from flexp.client.generation import SplitGenerator
from flexp.client.model import SplitModel
from flexp.client.personal import WholeModel, answering
from flexp.config import LoraConfig, RunConfig
from flexp.config.loading import validate
from flexp.data.columns import nearest
from flexp.data.types import ClientData, Example, Forward, Task
from flexp.errors import ConfigError, StorageError
from flexp.export.trained import BEST, EVERYBODY, LAST, OWN, FromCheckpoint, numbered
from flexp.export.whole import merged
from flexp.files import read_json
from flexp.methods.base import Method, World, method_of
from flexp.methods.split import Split
from flexp.models.stage import Stage
from flexp.report.metrics import read
from flexp.report.summary import Scores, best_round, picked_on, scores_by_round
from flexp.run.belonging import check_pretrained
from flexp.run.costs import MemoryProbes
from flexp.run.folder import check_scored, is_client
from flexp.run.participants import place
from flexp.run.runner import sample
from flexp.run.settle import world_of
from flexp.run.store import CHECKPOINTS, Checkpoint, Store, party_of


@dataclass(frozen=True)
class SavedRun:
    """A run as it was after one of its rounds.

    Attributes:
        scored: by round, every client's scores, of the rounds in which all were scored.
        checkpoint: of the round; read when :attr:`method` is asked for.
    """

    folder: Path
    config: RunConfig
    world: World
    scored: dict[int, Scores]
    checkpoint: Checkpoint

    @property
    def round(self) -> int:
        """Whose checkpoint it is."""
        return self.checkpoint.number

    @cached_property
    def method(self) -> Method:
        """The method as a resumption would have it.

        Raises:
            StorageError: the checkpoint is damaged or does not fit.
            ConfigError: the pretrained model is another one by now.
        """
        check_pretrained(self.checkpoint.facts, self.world.source, self.folder)
        state = {party: self.checkpoint.load(party) for party in self.checkpoint.files}
        method = method_of(self.config)(self.world)
        odd = sorted(method.state().keys() ^ state.keys())
        if odd:
            raise StorageError(
                f"{self.checkpoint.place}: {odd[0]} is in the checkpoint or in the data, not in both; the clients must "
                "be those of the run: put data.source back as it was"
            )
        method.load(state)
        return method

    @property
    def picked_on(self) -> str | None:
        """The data that this round was the best on, where it was: ``validation``, else ``test``."""
        best = best_round(self.scored, self.world.federation.task.higher_is_better)
        return picked_on(self.scored) if best == self.round else None

    def client(self, name: str | None) -> ClientData:
        """The data of the client ``name``; of the only one, if there is no other.

        Raises:
            ConfigError: there is no such client, or none was named.
        """
        return client_of(self.world, name)


class RunModel(FromCheckpoint):
    """A client's model of a run, all of it in this process.

    Args:
        client: as in :meth:`SavedRun.client`.
    """

    def __init__(self, run: SavedRun, client: str | None = None) -> None:
        self.run, self.data = run, run.client(client)
        self.folder, self.client, self.config = run.folder, self.data.name, run.config
        self.kind, self.labels = self.task.model_kind, self.task.label_names
        self.store, self.planned_cut = Store(run.folder / CHECKPOINTS), run.world.cuts[self.client]

    @cached_property
    def task(self) -> Task:
        """The run's."""
        return self.run.world.federation.task

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The run's."""
        return self.run.checkpoint

    @cached_property
    def round(self) -> int:
        """The checkpoint's."""
        return self.run.round

    def source(self) -> Stage:
        """All of the pretrained model."""
        return self.run.world.source

    @cached_property
    def forward(self) -> Forward:
        """As the run itself computes it."""
        return self.run.method.personal(self.client)

    @property
    def pretrained(self) -> Forward:
        """The model that the run started from."""
        if self.config.privacy.pool:
            raise ConfigError("--pretrained: the pretrained model has no mean between its blocks, as privacy.pool "
                              "gives the run's models; their round 0 is in metrics.jsonl")  # fmt: skip
        return answering(WholeModel(self.run.world.source))

    @cached_property
    def sets(self) -> dict[str, list[Example]]:
        """The test data that the run itself scores, example for example.

        Raises:
            DataError: they are others now.
        """
        check_scored(self.folder, self.checkpoint.facts, self.run.world.federation)
        return examples_of(self.run.world, self.client)

    @cached_property
    def about(self) -> str:
        """Where it is split, if it is."""
        return "the whole model" if self._split is None else f"split at {self._split.cut}, both sides in this process"

    @cached_property
    def generator(self) -> Any:
        """A split model where training was split, else the whole one."""
        if self._split is not None:
            return SplitGenerator(self._split)
        return merged(self.run.world.source, self.weights(), self.lora.alpha / self.lora.rank)

    @cached_property
    def _split(self) -> SplitModel | None:
        method = self.run.method
        model = method.clients[self.client].model if isinstance(method, Split) else None
        return model if isinstance(model, SplitModel) else None

    def weights(self) -> dict[str, Tensor]:
        """All that was trained of this model, by the names in it."""
        return self.run.method.trained_weights(self.client)

    @property
    def lora(self) -> LoraConfig:
        """Of its adapters, as the method has them."""
        return self.run.method.world.config.model.lora

    def facts(self) -> dict[str, Any]:
        """As the run's diary has them, which knows no scores of what was put in the client's place since."""
        scored = self.run.scored
        restored = self.checkpoint.replaced(party_of(self.client))
        return {
            "client": self.client,
            "round": self.round,
            "restored": restored,
            "picked_on": None if restored is not None else self.run.picked_on,
            "cut": list(self.cut),
            "absent": self.client in self.run.world.absent,
            "train_examples": len(self.data.train),
            "test_examples": len(self.data.test),
            "metric": self.task.metric,
            "scores": {
                "before": scored.get(0, {}).get(self.client),
                "after": None if restored is not None else scored.get(self.round, {}).get(self.client),
            },
        }

    def place(self) -> tuple[tuple[int, int], Mapping[str, Tensor]]:
        """See :class:`FromCheckpoint`; the client's part of the checkpoint may be damaged."""
        try:
            cut = self.cut
        except StorageError:
            cut = self.planned_cut
        world = replace(self.run.world, cuts={**self.run.world.cuts, self.client: cut})
        return cut, method_of(self.config)(world).state().get(party_of(self.client), {})

    def put(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
        """In the client's place of the last checkpoint; the other parties' files stay, byte for byte."""
        self.store.replace(self.round, party_of(self.client), tensors, said["round"])
        return self.round

    def close(self) -> None:
        """Let the method go, if it was there."""
        if "method" in self.run.__dict__:
            self.run.method.close()


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


def examples_of(world: World, client: str) -> dict[str, list[Example]]:
    """A client's own test examples, and everybody's as far as the run scores them."""
    config, own = world.config, client_of(world, client).test
    everybody = sample(world.federation.test, config.evaluation.global_examples, config.seed)
    return {OWN: own, EVERYBODY: everybody} if own else {EVERYBODY: everybody}


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


def look_into(folder: Path, which: str = LAST, device: str | None = None) -> SavedRun:
    """Rebuild what a run starts from, and find a checkpoint, which is not read yet.

    Args:
        which: ``last``, ``best`` (on validation data, where there is some, else on test data), or a round's number.
        device: where to compute; ``None``: as the run did.

    Raises:
        StorageError: ``folder`` holds no run, or the checkpoint is not there.
        FlexpError: model or data are not what they were.
    """
    config, store = run_config(folder).on(device), Store(folder / CHECKPOINTS)
    numbers = store.numbers()
    if not numbers:
        why = "output.checkpoint_every = 0 keeps none" if not config.output.checkpoint_every else "it stopped too early"
        raise StorageError(f"{folder} has no checkpoint ({why}), so its personal models are not there; run it again")
    world = world_of(folder, config)
    names = [client.name for client in world.federation.clients]
    task = world.federation.task
    scored = scores_by_round(read(folder / "metrics.jsonl"), names, task.metric)
    if which == BEST:
        best = best_round(scored, task.higher_is_better)
        if not best:
            raise StorageError("no trained round was scored yet, so there is no best one; use --round last")
        which = str(best)
    checkpoint = store.open(numbers[-1]) if which == LAST else numbered(store, which)
    world, _ = place(world, MemoryProbes(world, folder))
    return SavedRun(folder, config, world, scored, checkpoint)


def open_run(folder: Path, which: str = LAST) -> SavedRun:
    """Rebuild a run from its configuration and load a checkpoint, as a resumption would.

    Args:
        which: see :func:`look_into`.

    Raises:
        StorageError: ``folder`` holds no run, or the checkpoint is not there or does not fit.
        FlexpError: model or data are not what they were.
    """
    run = look_into(folder, which)
    assert run.method is not None  # whatever is damaged is told here
    return run
