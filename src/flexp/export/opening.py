"""One opener for all that holds a trained model: a run, what ``flexp client`` left, or an exported folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import transformers

from flexp.client.personal import answering
from flexp.config import DataConfig, ModelConfig, RunConfig
from flexp.data.split import Identity, check_same, identity, listed
from flexp.data.tasks import task_of
from flexp.data.types import Example, Forward
from flexp.errors import ConfigError, FlexpError, ModelError, StorageError
from flexp.export.card import FILE, SCHEMA
from flexp.export.client_folder import Connect, of_client, of_run
from flexp.export.saved import RunModel, client_of, examples_of, is_run, look_into, run_config
from flexp.export.trained import LAST, Trained
from flexp.files import read_json
from flexp.machine import device_of
from flexp.models.batches import align_padding
from flexp.models.fingerprint import weights_fingerprint
from flexp.models.heads import AUTO
from flexp.models.loading import quietly
from flexp.models.quantized import check_bitsandbytes
from flexp.run.folder import check_scored, is_client, saved_facts
from flexp.run.settle import model_folder, own_pad, world_of

MEND = "name the run that it was exported from, or score on a file with --data"
"""What to do about a run that an exported model is not of: its test data may be what the model was trained on."""


def open_trained(
    place: Path,
    client: str | None = None,
    which: str = LAST,
    connect: Connect | None = None,
    run: Path | None = None,
    device: str | None = None,
) -> Trained:
    """The trained model of a client, whatever ``place`` is.

    Args:
        client: whose; may be left out where there is only one.
        which: of a run ``last``, ``best`` or a round's number; of a client's folder ``last`` or a snapshot's.
        connect: gives a link of the client that is named to a running server, for the blocks that are not the client's
            own. Of a run, too, only the client's part is then read and loaded.
        run: of an exported model: a run on whose test data it is to be scored.
        device: where it is to compute; ``None``: as the run did; of an exported model, on the processor.

    Raises:
        StorageError: there is nothing of the kind, or it is damaged.
        ConfigError: there is no such client; or an argument does not fit what ``place`` is.
        FlexpError: model or data are not what they were.
    """
    if run is not None and (is_client(place) or is_run(place)):
        raise ConfigError(f"{place} is no exported model, and has its own test data: leave out --run")
    if is_client(place):
        return of_client(place, client, which, connect, device)
    if is_run(place):
        if connect is not None:
            return of_run(place, run_config(place).on(device), client, which, connect)
        return RunModel(look_into(place, which, device), client)
    if connect is not None and place.is_dir():
        raise ConfigError(f"{place} holds a whole model: leave out --server, or name the run")
    return ExportedModel(place, client, run, device)


class ExportedModel(Trained):
    """What ``flexp export`` wrote, loaded with transformers or peft alone.

    Args:
        client: must be the model's own, if it is said.
        run: see :func:`open_trained`.

    Raises:
        StorageError: ``folder`` holds no exported model.
        ConfigError: it is somebody else's.
    """

    def __init__(
        self, folder: Path, client: str | None = None, run: Path | None = None, device: str | None = None
    ) -> None:
        if not folder.is_dir():
            raise StorageError(f"there is no folder {folder}; expected that of a run, or what flexp export wrote")
        if not (folder / FILE).is_file():
            raise StorageError(f"{folder} holds neither a run (metrics.jsonl) nor what flexp export wrote ({FILE})")
        facts = read_json(folder / FILE)
        try:
            if facts["schema"] != SCHEMA:
                raise StorageError(f"{folder / FILE} is of another version of FlexP; export the model again")
            self.folder, self.client, self.labels = folder, str(facts["client"]), facts["labels"]
            data = DataConfig(source=str(folder), **facts["data"])
            self.kind, self._form, self._attention = facts["kind"], facts["form"], str(facts["attention"])
            self._round = int(facts["round"])
            # Older versions do not say these.
            self._identity: Identity | None = facts.get("identity")
            self._pretrained, self._seed = facts.get("pretrained"), facts.get("seed")
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{folder / FILE} is not what flexp export wrote ({error}); export it again") from error
        if client not in (None, self.client):
            raise ConfigError(
                f"{folder} holds the personal model of {self.client!r}, not of {client!r}; leave out --client"
            )
        self.config, self._run = RunConfig(model=ModelConfig(id=str(folder)), data=data).on(device), run
        if run is not None:
            self.config = self.config.model_copy(update={"evaluation": run_config(run).evaluation})

    @cached_property
    def round(self) -> int:
        """As ``flexp.json`` says."""
        return self._round

    @cached_property
    def sets(self) -> dict[str, list[Example]]:
        """Of the run that was named.

        Raises:
            ConfigError: the model is not of this run: another task, pretrained model, client or labels.
            DataError: the run divides the data otherwise than they were divided when the model was trained.
        """
        if self._run is None:
            return {}
        config = run_config(self._run)
        self._check_run(config)
        world = world_of(self._run, config)
        check_scored(self._run, saved_facts(self._run), world.federation)
        own, labels = client_of(world, self.client), world.federation.task.label_names
        if labels != self.labels:
            raise ConfigError(f"{self._run} has the labels {listed(labels)}, and {self.folder} was trained for "
                              f"{listed(self.labels)}; {MEND}")  # fmt: skip
        check_same(self._identity, identity([own], labels), self.folder, MEND, "model's run")
        return examples_of(world, own.name)

    def _check_run(self, config: RunConfig) -> None:
        """Refuse a run that the model cannot be of, before anything of it is loaded. Raises ConfigError."""
        task, there = task_of(config.data), weights_fingerprint(model_folder(config))
        if task.model_kind != self.kind:
            raise ConfigError(f"{self._run} is of the task {config.data.task}, and {self.folder} is a model for "
                              f"{self.config.data.task}; {MEND}")  # fmt: skip
        if None not in (self._pretrained, there) and self._pretrained != there:
            raise ConfigError(f"{self._run} started from another pretrained model than {self.folder}; {MEND}")
        if self._identity is not None:
            return
        if self._seed not in (None, config.seed):
            raise ConfigError(f"{self._run} has the seed {config.seed}, and {self.folder} was trained with "
                              f"{self._seed}, so on other examples; {MEND}")  # fmt: skip
        self.unchecked = (
            f"{self.folder} does not say which examples it was trained on: that they are those of {self._run} was not "
            "checked; export it again"
        )

    @cached_property
    def generator(self) -> Any:
        """The loaded model.

        Raises:
            ModelError: it cannot be loaded.
        """
        with quietly():
            try:
                return self._load().eval().to(device_of(self.config.model.device))
            except FlexpError:
                raise
            except Exception as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"{self.folder}: the exported model cannot be loaded ({first}); export it again"
                ) from error

    @cached_property
    def forward(self) -> Forward:
        """A batch may be anywhere."""
        answer = answering(self.generator)
        return lambda batch: answer({key: value.to(self.generator.device) for key, value in batch.items()})

    def _load(self) -> Any:
        where, settings = str(self.folder), transformers.AutoConfig.from_pretrained(self.folder)
        if self._form == "adapter":
            where = str(read_json(self.folder / "adapter_config.json")["base_model_name_or_path"])
        known = {"config": settings, "dtype": settings.dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
        try:
            model = AUTO[self.kind].from_pretrained(where, attn_implementation=self._attention, **known)
        except ValueError:  # the architecture has another attention only
            model = AUTO[self.kind].from_pretrained(where, **known)
        align_padding(model, own_pad(self.kind, self.processor))
        if self._form == "adapter":
            check_bitsandbytes(f"{self.folder}: an adapter (peft)")
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(self.folder))
        return model
