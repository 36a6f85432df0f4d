"""Where a client's personal parts live, to be backed up and put back: a checkpoint of a run, or a client's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flexp._version import __version__
from flexp.client.trainer import cut_in
from flexp.config import RunConfig
from flexp.errors import ConfigError, StorageError
from flexp.export.client_folder import PERSONAL, ClientFolder, Taken, open_client
from flexp.export.facts import origin
from flexp.export.saved import Opened, client_of, look_into
from flexp.methods.base import method_of
from flexp.models.fingerprint import fingerprint
from flexp.models.parts import Part
from flexp.models.stage import Stage
from flexp.run import checkpoints
from flexp.run.folder import is_client

SCHEMA = 1
KIND = "flexp personal state"


@dataclass(frozen=True)
class Backup:
    """What a file holds.

    Attributes:
        tensors: the client's state, as its method names it; with FlexP-SFL ``personal/NAME`` are the weights.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    encrypted: bool

    @property
    def weights(self) -> dict[str, Tensor]:
        """The personal weights by their names in the whole model."""
        return {name.removeprefix(PERSONAL): value for name, value in self.tensors.items() if name.startswith(PERSONAL)}


class Home(Protocol):
    """One client's personal parts, where they are.

    Attributes:
        facts: what they belong to, JSON-ready.
    """

    facts: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The client's state.

        Raises:
            ConfigError: the method keeps nothing of its own.
            StorageError: it is damaged.
        """
        ...

    def fresh(self) -> Mapping[str, Tensor]:
        """The state of a client that has not trained yet, as far as its names and shapes are known without training."""
        ...

    def put(self, found: Backup) -> int:
        """Put a state in its place; gives the number of the checkpoint or snapshot."""
        ...


def home_of(folder: Path, client: str | None, which: str, *, into: bool = False) -> Home:
    """The parts of ``client`` in ``folder``.

    Args:
        which: after which round, or the number of which snapshot.
        into: to put something there, so that nothing need be there yet.

    Raises:
        FlexpError: there are none.
    """
    if is_client(folder):
        opened = open_client(folder, client)
        return ClientHome(opened, None if into else opened.taken(which))
    found = look_into(folder, which)
    return RunHome(found, client_of(found.world, client).name)


class RunHome:
    """In a checkpoint of a run."""

    def __init__(self, opened: Opened, client: str) -> None:
        self._opened, self._party, self._client = opened, f"client-{client}", client
        world, task = opened.world, opened.world.federation.task
        try:
            cut = cut_in(checkpoints.load_party(opened.place, self._party) or {}) or world.cuts[client]
        except StorageError:  # damaged: perhaps it is to be put back
            cut = world.cuts[client]
        self._world = replace(world, cuts={**world.cuts, client: cut})  # it may have moved in the middle of the run
        self.facts = _facts(opened.config, client, opened.number, cut, world.source, task.model_kind, task.label_names)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Home`."""
        tensors = checkpoints.load_party(self._opened.place, self._party)
        if tensors is None:
            raise ConfigError(
                f"the method {self._opened.config.method.name} keeps nothing that is {self._client!r}'s own"
            )
        return tensors

    def fresh(self) -> Mapping[str, Tensor]:
        """See :class:`Home`."""
        return method_of(self._opened.config)(self._world).state().get(self._party, {})

    def put(self, found: Backup) -> int:
        """See :class:`Home`."""
        checkpoints.replace_party(self._opened.place, self._party, found.tensors)
        return self._opened.number


class ClientHome:
    """In what ``flexp client`` left.

    Args:
        taken: the snapshot; ``None``: a place to put one.
    """

    def __init__(self, opened: ClientFolder, taken: Taken | None) -> None:
        self._opened, self._taken = opened, taken
        cut = (int(opened.facts["cut"][0]), int(opened.facts["cut"][1])) if taken is None else taken.cut
        self._cut = cut
        steps = 0 if taken is None else taken.steps
        number = steps // opened.config.train.steps_per_round
        ends = opened.stage(Part(frozenset(), ends=True))
        self.facts = _facts(opened.config, opened.client, number, cut, ends, opened.kind, opened.labels)
        if taken is not None:
            self.facts["snapshot"] = {key: taken.facts[key] for key in ("run", "numbering")} | {"number": taken.number}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Home`."""
        assert self._taken is not None
        return self._taken.tensors()

    def fresh(self) -> Mapping[str, Tensor]:
        """See :class:`Home`."""
        stage = self._opened.own_stage(self._cut)
        return {f"{PERSONAL}{name}": value for name, value in stage.trainable().items()}

    def put(self, found: Backup) -> int:
        """See :class:`Home`.

        Raises:
            ConfigError: the file is from a simulation, which knows nothing of a server's run.
        """
        said = found.facts.get("snapshot")
        if not isinstance(said, dict):
            raise ConfigError(
                f"the file is from a run of flexp run, and {self._opened.folder} is a client's: restore it into a run"
            )
        number, snapshots = int(said["number"]), self._opened.snapshots
        facts = {
            "run": said["run"],
            "client": self._opened.client,
            "numbering": said["numbering"],
            "steps": found.facts["steps"],
            "cut": list(self._cut),
        }
        for later in [later for later in snapshots.numbers() if later > number]:
            snapshots.put_aside(later)
        snapshots.save(number, found.tensors, facts)
        return number


def _facts(
    config: RunConfig,
    client: str,
    number: int,
    cut: tuple[int, int],
    stage: Stage,
    kind: str,
    labels: list[str] | None,
) -> dict[str, Any]:
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "flexp": __version__,
        "client": client,
        "run": config.name,
        "seed": config.seed,
        "round": number,
        "model": origin(config.model.id),
        "fingerprint": fingerprint(stage.model.config),
        "weights": stage.weights,
        "model_kind": kind,
        "labels": labels,
        "method": config.method.name,
        "cut": list(cut),
        "tuning": config.model.tuning,
        "lora": config.model.lora.model_dump(mode="json") if config.model.tuning == "lora" else None,
        "train_embeddings": config.model.train_embeddings,
        "dtype": config.model.dtype,
        "optimizer": config.train.personal.name,
        "follow": method_of(config).aligns and config.method.align.follow,
    }
