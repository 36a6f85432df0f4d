"""What every use of a trained model sees of it, wherever it was found.

Export, scores, text and backups take a :class:`Trained` from :func:`flexp.export.opening.open_trained`. They know
neither how it was trained nor where its middle is. Nothing is loaded or joined before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from flexp.client.personal import answering
from flexp.client.recut import PERSONAL
from flexp.client.trainer import cut_in
from flexp.config import RunConfig
from flexp.data.split import Identity, of_client
from flexp.data.tasks import limit_of, make_task, task_of
from flexp.data.types import Example, Forward, Task
from flexp.errors import ConfigError, StorageError
from flexp.kinds import ModelKind
from flexp.models.batches import max_positions
from flexp.models.loading import load_config, load_processor
from flexp.models.stage import Stage
from flexp.run.settle import model_folder
from flexp.run.store import Checkpoint, Store, party_of

LAST, BEST = "last", "best"
OWN, EVERYBODY = "own test data", "everybody's test data"


class Trained:
    """One client's trained model.

    Attributes:
        folder: where it was found.
        client: whose it is.
        config: of the run; of an exported folder, the model and the task alone.
        kind: what the model is for.
        labels: of a classifier.
        unchecked: what nobody could check of :attr:`sets`, in words, once they were asked for.
    """

    folder: Path
    client: str
    config: RunConfig
    kind: ModelKind
    labels: list[str] | None
    unchecked: str | None = None

    @cached_property
    def round(self) -> int:
        """Of the run, after which it was so."""
        raise NotImplementedError

    @cached_property
    def generator(self) -> Any:
        """The model itself, which has transformers' ``generate`` where it writes text.

        Raises:
            ModelError: it cannot be loaded.
            LinkError: its middle is on a server, which refuses or cannot be reached.
        """
        raise NotImplementedError

    @cached_property
    def forward(self) -> Forward:
        """What it answers to a batch; raises as :attr:`generator` does."""
        return answering(self.generator)

    @cached_property
    def about(self) -> str:
        """How it computes, in a few words."""
        return "the whole model"

    @cached_property
    def sets(self) -> dict[str, list[Example]]:
        """Test examples by what they are (:data:`OWN`, :data:`EVERYBODY`), where a run is known."""
        return {}

    @cached_property
    def processor(self) -> Any:
        """Its tokenizer or image processor."""
        return load_processor(model_folder(self.config), images=task_of(self.config.data).images)

    @cached_property
    def positions(self) -> int | None:
        """The longest input in tokens, where there is a limit."""
        return max_positions(load_config(model_folder(self.config)))

    @cached_property
    def task(self) -> Task:
        """What it was trained for."""
        data = self.config.data
        return make_task(data, self.processor, limit_of(data, self.positions), self.labels or [])

    @property
    def pretrained(self) -> Forward:
        """What the model answered before training.

        Raises:
            ConfigError: that is not here.
        """
        raise ConfigError("--pretrained needs the run: an exported folder does not hold the pretrained model")

    def facts(self) -> dict[str, Any]:
        """What ``flexp.json`` and the card say of this one model: round, cut, examples, scores.

        Raises:
            ConfigError: it was exported already.
        """
        raise ConfigError(f"{self.folder} is an exported model already: copy it")

    def close(self) -> None:
        """Let go of links."""


class FromCheckpoint(Trained):
    """A model of which a checkpoint has the client's own part.

    Attributes:
        planned_cut: where the client cuts, as far as no checkpoint says otherwise.
    """

    store: Store
    planned_cut: tuple[int, int]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """That was asked for."""
        raise NotImplementedError

    @cached_property
    def cut(self) -> tuple[int, int]:
        """(s, e) of then; a client may move during a run."""
        return cut_in(self._part(lambda name: name == "cut")) or self.planned_cut

    @cached_property
    def steps(self) -> int | None:
        """That the client had done, where its method counts them."""
        found = self._part(lambda name: name == "steps")
        return int(found["steps"]) if found else None

    def state(self) -> dict[str, Tensor]:
        """The client's own part: weights, optimiser, counters.

        Raises:
            ConfigError: its method keeps nothing that is the client's own.
            StorageError: it is damaged.
        """
        found = self._part(lambda _: True)
        if not found:
            raise ConfigError(f"the method {self.config.method.name} keeps nothing that is {self.client!r}'s own")
        return found

    def personal(self, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Tensor]:
        """The personal weights with a ``wanted`` name in the whole model."""
        size = len(PERSONAL)
        found = self._part(lambda name: name.startswith(PERSONAL) and wanted(name[size:]))
        return {name[size:]: value for name, value in found.items()}

    def identity(self, client: str) -> Identity | None:
        """Of a client's examples in training; ``None``: not known, as where all of its snapshots are gone."""
        try:
            return of_client(self.checkpoint.facts.get("data"), client)
        except StorageError:
            return None

    def _part(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        party = party_of(self.client)
        return self.checkpoint.load(party, wanted) if party in self.checkpoint.files else {}

    def source(self) -> Stage:
        """The pretrained model, or its ends alone."""
        raise NotImplementedError

    def place(self) -> tuple[tuple[int, int], Mapping[str, Tensor]]:
        """The cut that a backup must have to be put here; and the state of a client that has not trained yet, as far as
        its names and shapes are known without training."""
        raise NotImplementedError

    def put(self, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> int:
        """Put a backup's state and facts in this place; gives the number of the checkpoint.

        Raises:
            ConfigError: they are of another kind of place.
            StorageError: it cannot be written.
        """
        raise NotImplementedError


def numbered(store: Store, which: str) -> Checkpoint:
    """The checkpoint that a user's number names.

    Raises:
        ConfigError: ``which`` is no number.
        StorageError: there is no such checkpoint, or its index is damaged.
    """
    if not which.isdecimal():
        raise ConfigError(f"--round {which}: expected a number or last (of a whole run, also best)")
    numbers = store.numbers()
    if int(which) not in numbers:
        there = ", ".join(map(str, numbers)) or "none"
        raise StorageError(
            f"{store.folder} has no checkpoint {which}; it has {there} (the last ones are kept, and with "
            "data.validation_fraction the best)"
        )
    return store.open(int(which))
