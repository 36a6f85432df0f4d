"""What ``flexp client`` leaves, opened to use its personal model; the middle of that is on a server.

Nothing in the folder changes, also while the client trains. Of a snapshot only the tensors that are asked for are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flexp.client.model import SplitModel
from flexp.config import CodecConfig, RunConfig
from flexp.config.loading import validate
from flexp.data.types import ModelKind
from flexp.errors import ConfigError, StorageError
from flexp.export.saved import LAST
from flexp.files import read_json
from flexp.links.base import Link
from flexp.methods.parties import split_model, tune_own
from flexp.models.loading import load_config
from flexp.models.parts import Part
from flexp.models.stage import Stage
from flexp.run.folder import is_client, read_facts
from flexp.run.setup import load_part, load_processor, model_folder, own_pad
from flexp.run.store import SNAPSHOTS, Checkpoint, OtherVersionError, Store, party_of

PERSONAL = "personal/"


@dataclass(frozen=True)
class Taken:
    """One of the client's snapshots, whole."""

    client: str
    checkpoint: Checkpoint

    @property
    def number(self) -> int:
        """The snapshot's."""
        return self.checkpoint.number

    @property
    def facts(self) -> dict[str, Any]:
        """Run, numbering, steps and cut, as the client saved them."""
        return self.checkpoint.facts

    @property
    def steps(self) -> int:
        """That the client had done."""
        return int(self.facts["steps"])

    @property
    def cut(self) -> tuple[int, int]:
        """(s, e) of then; a client may have moved since."""
        start, stop = self.facts["cut"]
        return int(start), int(stop)

    def tensors(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """Of the client's state those with a ``wanted`` name, copied."""
        return self.checkpoint.load(party_of(self.client), wanted)

    def personal(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """The personal weights with a ``wanted`` name in the whole model."""
        size = len(PERSONAL)
        found = self.tensors(lambda name: name.startswith(PERSONAL) and wanted(name[size:]))
        return {name[size:]: value for name, value in found.items()}


@dataclass(frozen=True)
class ClientFolder:
    """A client's state folder.

    Attributes:
        config: as the client was started with.
        facts: see :func:`flexp.run.folder.write_facts`.
    """

    folder: Path
    config: RunConfig
    facts: dict[str, Any]

    @property
    def client(self) -> str:
        """Its name."""
        return str(self.facts["client"])

    @property
    def kind(self) -> ModelKind:
        """What its model is for."""
        kind: ModelKind = self.facts["kind"]
        return kind

    @property
    def labels(self) -> list[str] | None:
        """Of a classifier."""
        labels: list[str] | None = self.facts["labels"]
        return labels

    @property
    def snapshots(self) -> Store:
        """Where its state is."""
        return Store(self.folder / SNAPSHOTS, keep=None)

    @property
    def model_id(self) -> str:
        """Its pretrained model: a folder, or an id."""
        return model_folder(self.config)

    @property
    def blocks(self) -> int:
        """L of its model."""
        return int(load_config(self.model_id).get_text_config().num_hidden_layers)

    def processor(self) -> Any:
        """Its tokenizer or image processor."""
        return load_processor(self.model_id, self.config)

    def taken(self, which: str = LAST) -> Taken:
        """A snapshot: ``last`` is the newest that is whole, or a snapshot's number.

        Raises:
            ConfigError: ``which`` is something else.
            StorageError: there is no such snapshot, or none that is whole.
        """
        numbers = self.snapshots.numbers()
        if which != LAST:
            if not which.isdecimal():
                raise ConfigError(f"--round {which}: of a client's folder it is last, or the number of a snapshot")
            if int(which) not in numbers:
                there = ", ".join(map(str, numbers)) or "none"
                raise StorageError(f"{self.folder} has no snapshot {which}; it has {there}")
            return self._taken(int(which))
        for number in reversed(numbers):
            try:
                return self._taken(number)
            except OtherVersionError:
                raise
            except StorageError:
                continue  # the one before it may be whole
        raise StorageError(f"{self.folder} has no whole snapshot, so its personal weights are not there; restore one")

    def _taken(self, number: int) -> Taken:
        found = self.snapshots.open(number)
        found.check()
        return Taken(self.client, found)

    def stage(self, part: Part, processor: Any = None) -> Stage:
        """A part of the pretrained model as the client itself would load it; nothing of it is trained."""
        pad = own_pad(self.kind, processor if processor is not None else self.processor())
        return load_part(self.config, self.model_id, self.kind, self.labels, pad, part)

    def own_stage(self, cut: tuple[int, int]) -> Stage:
        """All that the client has, tuned, without its training."""
        stage = self.stage(Part.client(cut, self.blocks))
        tune_own(stage, self.config)
        return stage

    def split(self, taken: Taken, link: Link) -> SplitModel:
        """The personal model, its middle over ``link``, where everything crosses as it is.

        Raises:
            LinkError: the server refuses.
            ModelError: the snapshot is of another tuning.
        """
        stage, numbering = self.own_stage(taken.cut), int(taken.facts["numbering"])
        codec = CodecConfig()
        model = split_model(self.config, stage, taken.cut, link, self.kind, codec=codec, numbering=numbering)
        model.load_personal_state(taken.personal())
        return model

    def records(self) -> Iterator[dict[str, Any]]:
        """Of its diary the scores."""
        from flexp.report.metrics import read

        path = self.folder / "metrics.jsonl"
        return (record for record in (read(path) if path.is_file() else []) if record["kind"] == "eval")


def open_client(folder: Path, client: str | None = None) -> ClientFolder:
    """Open what ``flexp client`` left.

    Args:
        client: must be the folder's own, if it is said.

    Raises:
        StorageError: ``folder`` holds nothing of the kind.
        ConfigError: it is somebody else's.
    """
    if not is_client(folder):
        if not folder.is_dir():
            raise StorageError(f"there is no folder {folder}; expected what flexp client leaves")
        raise StorageError(f"{folder} is not what flexp client leaves: expected its client.json and snapshots")
    facts = read_facts(folder)
    if client not in (None, facts["client"]):
        raise ConfigError(f"{folder} is of the client {facts['client']!r}, not of {client!r}; leave out --client")
    path = folder / "config.json"
    return ClientFolder(folder, validate(read_json(path), str(path)), facts)


def middle(folder: Path, connect: Callable[[str], Link] | None) -> Callable[[str], Link]:
    """``connect``, without which a client's model has no middle.

    Raises:
        ConfigError: there is none.
    """
    if connect is None:
        raise ConfigError(
            f"{folder} holds a client's own parts; the middle of its model is on a server: say where with "
            "--server grpcs://HOST:PORT"
        )
    return connect
