"""A client's own parts, with the middle of its model on a server: of what ``flexp client`` left, or of a run's folder.

Nothing in the folder changes, also while the client trains; of a checkpoint only the tensors that are asked for are
read, and nobody's data but for scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from flexp.client.generation import SplitGenerator
from flexp.client.model import SplitModel
from flexp.client.personal import answering
from flexp.client.recut import PERSONAL
from flexp.config import CodecConfig, RunConfig
from flexp.config.loading import validate
from flexp.data.types import Example, Forward
from flexp.errors import ConfigError, LinkLostError, StorageError
from flexp.export.trained import LAST, OWN, FromCheckpoint, numbered
from flexp.files import read_json
from flexp.links.base import Link
from flexp.methods.base import method_of
from flexp.methods.parties import split_model, tune_own
from flexp.models.anatomy import Part, block_count
from flexp.models.loading import load_config
from flexp.models.stage import Stage
from flexp.report.metrics import read
from flexp.run.belonging import check_pretrained
from flexp.run.folder import check_scored, is_client, read_facts
from flexp.run.server import make_server
from flexp.run.settle import load_part, model_folder, own_pad, settle_client
from flexp.run.store import CHECKPOINTS, SNAPSHOTS, Checkpoint, Store, party_of

Connect = Callable[[str], Link]
"""Gives a link of the client that is named to a running server."""


class ClientModel(FromCheckpoint):
    """See above.

    Args:
        known: name, cut, kind, labels, metric and numbers of examples, as ``client.json`` has them.
        which: ``last`` (the newest whole checkpoint), or a number.
        connect: called again when a link breaks; ``None``: whatever needs the middle is refused.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        known: Mapping[str, Any],
        store: Store,
        which: str = LAST,
        connect: Connect | None = None,
    ) -> None:
        self.folder, self.config, self.store = folder, config, store
        self.client, self.kind, self.labels = str(known["client"]), known["kind"], known["labels"]
        self.planned_cut = (int(known["cut"][0]), int(known["cut"][1]))
        self._known, self._which, self._connect = known, which, connect

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """That was asked for, whole."""
        if self._which != LAST:
            found = numbered(self.store, self._which)
            found.checked(party_of(self.client))
            return found
        newest = self.store.newest_whole()
        if newest is None:
            raise StorageError(
                f"{self.folder} has no whole checkpoint, so its personal weights are not there; restore one"
            )
        return newest

    @cached_property
    def round(self) -> int:
        """So many of its own steps."""
        return (self.steps or 0) // self.config.train.steps_per_round

    @property
    def blocks(self) -> int:
        """L of its model."""
        model = model_folder(self.config)
        return block_count(model, load_config(model))

    @property
    def numbering(self) -> int | None:
        """Of its steps, where a server has counted them."""
        found: int | None = self.checkpoint.facts.get("numbering")
        return found

    def reach(self) -> Link:
        """A new link to the server.

        Raises:
            ConfigError: none was named.
            LinkError: it cannot be reached.
        """
        if self._connect is None and self.cut[0] == self.blocks:  # all of its model is here
            return make_server(self.config, *self.cut, self.kind, None, remembers=False).connect(self.client)
        if self._connect is None:
            raise ConfigError(
                f"{self.folder} holds a client's own parts; the middle of its model is on a server: say where with "
                "--server grpcs://HOST:PORT"
            )
        return self._connect(self.client)

    def stage(self, part: Part) -> Stage:
        """A part of the pretrained model as the client itself would load it; nothing of it is trained."""
        pad = own_pad(self.kind, self.processor)
        stage = load_part(self.config, model_folder(self.config), self.kind, self.labels, pad, part)
        with suppress(StorageError):  # all of its snapshots are gone, and a backup says by itself what it is of
            check_pretrained(self.checkpoint.facts, stage, self.folder)
        return stage

    def source(self) -> Stage:
        """Its ends, without any block."""
        return self.stage(Part(frozenset(), ends=True))

    def own_stage(self, cut: tuple[int, int]) -> Stage:
        """All that the client has, tuned, without its training."""
        stage = self.stage(Part.client(cut, self.blocks))
        tune_own(stage, self.config)
        return stage

    @cached_property
    def split(self) -> SplitModel:
        """The personal model, its middle over a link, where everything crosses as it is.

        Raises:
            LinkError: the server refuses.
            ModelError: the checkpoint is of another tuning.
        """
        link = self.reach()
        numbering, codec = self.numbering, CodecConfig()
        stage = self.own_stage(self.cut)
        model = split_model(self.config, stage, self.cut, link, self.kind, codec=codec, numbering=numbering)
        model.load_personal_state(self.personal())
        return model

    @cached_property
    def about(self) -> str:
        """Where it is split."""
        return "all of the model" if self.cut[0] == self.blocks else f"split at {self.cut}, its middle on a server"

    @cached_property
    def forward(self) -> Forward:
        """Over the link, or a new one when it breaks."""
        answer = answering(self.split)

        def forward(batch: Mapping[str, Tensor]) -> Any:
            try:
                return answer(batch)
            except LinkLostError as error:
                return self.split.again(lambda: answer(batch), self.reach, error)

        return forward

    @cached_property
    def generator(self) -> Any:
        """The same; an answer goes on over a new link when one breaks."""
        return SplitGenerator(self.split, self.reach)

    @cached_property
    def sets(self) -> dict[str, list[Example]]:
        """Its own test data, which are read for that.

        Raises:
            DataError: they are others than in training.
        """
        setup = settle_client(self.config, self.client, self.cut)
        check_scored(self.folder, self.checkpoint.facts, setup.run.federation, self.client)
        return {OWN: setup.data.test} if setup.data.test else {}

    def facts(self) -> dict[str, Any]:
        """As its own diary has them."""
        metric = self._known["metric"]
        scores = {int(record["round"]): record["personal"].get(metric) for record in self._records()}
        steps = self.steps or 0
        number, rest = divmod(steps, self.config.train.steps_per_round)
        before, after = ({"personal": value} if value is not None else None for value in map(scores.get, (0, number)))
        return {
            "client": self.client,
            "round": number,
            "steps": steps,
            "restored": None,
            "picked_on": None,
            "cut": list(self.cut),
            "absent": False,
            "train_examples": self._known["train_examples"],
            "test_examples": self._known["test_examples"],
            "metric": metric,
            "scores": {"before": before, "after": None if rest else after},
        }

    def _records(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        records = read(path) if path.is_file() else []
        return (record for record in records if record["kind"] == "eval" and record["client"] == self.client)

    def place(self) -> tuple[tuple[int, int], Mapping[str, Tensor]]:
        """See :class:`FromCheckpoint`: the cut that the client goes on with, and what it trains."""
        stage = self.own_stage(self.planned_cut)
        return self.planned_cut, {f"{PERSONAL}{name}": value for name, value in stage.trainable().items()}

    def put(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
        """As the snapshot that it was; later ones are quarantined.

        Raises:
            ConfigError: the backup is of a simulation, which knows nothing of a server's run.
            StorageError: the client is at work there.
        """
        snapshot = said.get("snapshot")
        if not isinstance(snapshot, dict):
            raise ConfigError(
                f"the file is from a run of flexp run, and {self.folder} is a client's: restore it into a run"
            )
        self.store.claim()
        number = int(snapshot["number"])
        kept = {"client": self.client, **{key: snapshot[key] for key in ("run", "numbering", "met") if key in snapshot}}
        for later in [later for later in self.store.numbers() if later > number]:
            self.store.quarantine(later)
        facts = {**kept, "steps": said["steps"], "cut": list(self.planned_cut), "data": said.get("data")}
        self.store.save(number, {party_of(self.client): tensors}, facts)
        return number

    def close(self) -> None:
        """Let go of the link, if there is one."""
        if "split" in self.__dict__:
            self.split.link.close()


def of_client(
    folder: Path, client: str | None, which: str, connect: Connect | None, device: str | None = None
) -> ClientModel:
    """What ``flexp client`` left.

    Raises:
        StorageError: ``folder`` holds nothing of the kind.
        ConfigError: it is another client's.
    """
    if not is_client(folder):
        raise StorageError(f"{folder} is not what flexp client leaves: expected its client.json and snapshots")
    known, path = read_facts(folder), folder / "config.json"
    if client not in (None, known["client"]):
        raise ConfigError(f"{folder} is of the client {known['client']!r}, not of {client!r}; leave out --client")
    config, store = validate(read_json(path), str(path)).on(device), Store(folder / SNAPSHOTS, keep=None)
    return ClientModel(folder, config, known, store, which, connect)


def of_run(folder: Path, config: RunConfig, client: str | None, which: str, connect: Connect) -> ClientModel:
    """A client of a run whose models are split, known from the run's own summary, so that nobody's data need be there.

    Raises:
        ConfigError: the run's models are not split, or it has no such client.
        StorageError: its summary does not name it.
    """
    if not method_of(config).recuts:
        raise ConfigError(f"--server needs a split model, and the method of {folder} is {config.method.name}")
    path = folder / "summary.json"
    try:
        summary = read_json(path)
        shared = {"metric": summary["metric"], "kind": summary["model"]["kind"], "labels": summary["model"]["labels"]}
        rows = {
            str(row["name"]): {key: row[key] for key in ("cut", "train_examples", "test_examples")}
            for row in summary["clients"]
        }
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{path} does not tell the clients' cuts; run flexp report {folder}, or train again"
        ) from error
    if client is None and len(rows) == 1:
        client = next(iter(rows))
    if client not in rows:
        known = ", ".join(map(repr, list(rows)[:16]))
        raise ConfigError(f"the run has no client {client!r}: say whose model with --client; it has {known}")
    store = Store(folder / CHECKPOINTS)
    if which == LAST and store.numbers():  # its own part of it is checked, and the others' need not be there
        which = str(store.numbers()[-1])
    return ClientModel(folder, config, {**shared, **rows[client], "client": client}, store, which, connect)
