"""A personal model that is ready to answer: of a run, or of an exported folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from flexp.client.personal import WholeModel
from flexp.config import DataConfig, ModelConfig, RunConfig
from flexp.data.tasks import limit_of, make_task
from flexp.data.types import Example, Forward, Task
from flexp.errors import ConfigError, FlexpError, ModelError, StorageError
from flexp.export.client_folder import middle, open_client
from flexp.export.facts import FILE, SCHEMA
from flexp.export.saved import LAST, client_of, is_run, open_run, run_config
from flexp.files import read_json
from flexp.links.base import Link
from flexp.methods.base import World
from flexp.models.loading import AUTO, quietly
from flexp.run.folder import is_client
from flexp.run.runner import sample
from flexp.run.settle import load_processor, max_positions, settle_client, world_of

OWN, EVERYBODY = "own test data", "everybody's test data"


@dataclass(frozen=True)
class Usable:
    """A model with its task.

    Attributes:
        round: of the run, after which it was so.
        sets: examples by what they are: :data:`OWN` and :data:`EVERYBODY` where a run is known.
        pretrained: the model before training, where a run is known.
        model: of an exported folder, the model itself.
        positions: the longest input in tokens, where there is a limit.
        close: lets go of a link.
    """

    client: str
    round: int
    forward: Forward
    task: Task
    data: DataConfig
    batch_size: int
    sets: dict[str, list[Example]] = field(default_factory=dict)
    pretrained: Forward | None = None
    model: Any = None
    positions: int | None = None
    close: Callable[[], None] = lambda: None


def of_run(folder: Path, client: str | None, which: str = LAST) -> Usable:
    """The personal model of a client, as the run itself computes it.

    Raises:
        FlexpError: see :func:`flexp.export.saved.open_run`.
    """
    run = open_run(folder, which)
    data, config = run.client(client), run.config
    return Usable(
        client=data.name,
        round=run.round,
        forward=run.method.personal(data.name),
        task=run.world.federation.task,
        data=config.data,
        batch_size=config.evaluation.batch_size,
        sets=_sets(run.world, data.name),
        pretrained=_answering(WholeModel(run.world.source)),
        positions=max_positions(run.world.source.model.config),
    )


def of_folder(folder: Path, client: str | None = None, run: Path | None = None) -> Usable:
    """An exported model, loaded with transformers or peft alone.

    Args:
        client: must be the model's own, if it is said.
        run: a run on whose test data it is to be scored.

    Raises:
        StorageError: ``folder`` holds no exported model.
        ModelError: it cannot be loaded.
        ConfigError: it is somebody else's.
    """
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}; expected that of a run, or what flexp export wrote")
    if not (folder / FILE).is_file():
        raise StorageError(f"{folder} holds neither a run (metrics.jsonl) nor what flexp export wrote ({FILE})")
    facts = read_json(folder / FILE)
    try:
        if facts["schema"] != SCHEMA:
            raise StorageError(f"{folder / FILE} is of another version of FlexP; export the model again")
        owner, number, labels = str(facts["client"]), int(facts["round"]), facts["labels"]
        data = DataConfig(source=str(folder), **facts["data"])
        kind, form, attention = facts["kind"], facts["form"], str(facts["attention"])
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{folder / FILE} is not what flexp export wrote ({error}); export it again") from error
    if client is not None and client != owner:
        raise ConfigError(f"{folder} holds the personal model of {owner!r}, not of {client!r}; leave out --client")
    model = _load(folder, kind, form, attention)
    config = RunConfig(model=ModelConfig(id=str(folder)), data=data)
    processor = load_processor(str(folder), config)
    task = make_task(data, processor, limit_of(data, max_positions(model.config)), labels or [])
    sets, size = {}, config.evaluation.batch_size
    if run is not None:
        settings = run_config(run)
        world, size = world_of(run, settings), settings.evaluation.batch_size
        sets = _sets(world, client_of(world, owner).name)
    positions = max_positions(model.config)
    return Usable(owner, number, _answering(model), task, data, size, sets, model=model, positions=positions)


def of_client(
    folder: Path, client: str | None, connect: Callable[[str], Link] | None, which: str = LAST, own_data: bool = True
) -> Usable:
    """The personal model of what ``flexp client`` left, its middle on a running server.

    Args:
        connect: gives a link of the client that is named.
        which: a snapshot (:meth:`flexp.export.client_folder.ClientFolder.taken`).
        own_data: read the client's data, to score the model on its test examples.

    Raises:
        ConfigError: there is no ``connect``, or the folder is another client's.
        FlexpError: see :mod:`flexp.export.client_folder`; or the data are not what they were.
    """
    opened = open_client(folder, client)
    reach = middle(folder, connect)
    taken, config = opened.taken(which), opened.config
    sets = {OWN: settle_client(config, opened.client, taken.cut).data.test} if own_data else {}
    split = opened.split(taken, reach(opened.client))
    positions = max_positions(split.config)
    task = make_task(config.data, opened.processor(), limit_of(config.data, positions), opened.labels or [])
    number, size = taken.steps // config.train.steps_per_round, config.evaluation.batch_size
    return Usable(
        opened.client,
        number,
        _answering(split),
        task,
        config.data,
        size,
        {name: examples for name, examples in sets.items() if examples},
        positions=positions,
        close=lambda: split.link.close(),
    )


def open_model(
    place: Path,
    client: str | None,
    which: str = LAST,
    run: Path | None = None,
    connect: Callable[[str], Link] | None = None,
    own_data: bool = True,
) -> Usable:
    """What ``place`` is: a run, what ``flexp client`` leaves, or an exported folder.

    Args:
        connect: of a client's folder: see :func:`of_client`.
        own_data: likewise.

    Raises:
        FlexpError: it is none of them; see :func:`of_run`, :func:`of_client` and :func:`of_folder`.
    """
    if is_client(place):
        if run is not None:
            raise ConfigError(f"{place} is what a client left: leave out --run")
        return of_client(place, client, connect, which, own_data)
    if connect is not None and place.is_dir():
        raise ConfigError(f"{place} holds all of its models: leave out --server")
    if not is_run(place):
        return of_folder(place, client, run)
    if run is not None:
        raise ConfigError(f"{place} is a run itself: leave out --run")
    return of_run(place, client, which)


def _sets(world: World, client: str) -> dict[str, list[Example]]:
    """The test data that the run itself scores, example for example."""
    config, own = world.config, client_of(world, client).test
    everybody = sample(world.federation.test, config.evaluation.global_examples, config.seed)
    return {OWN: own, EVERYBODY: everybody} if own else {EVERYBODY: everybody}


def _load(folder: Path, kind: str, form: str, attention: str) -> Any:
    with quietly():
        try:
            settings = transformers.AutoConfig.from_pretrained(folder)
            where = str(folder)
            if form == "adapter":
                where = str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
            classes = AUTO[kind]
            known = {
                "config": settings,
                "dtype": settings.dtype,
                "use_safetensors": True,
                "ignore_mismatched_sizes": True,
            }
            try:
                model = classes.from_pretrained(where, attn_implementation=attention, **known)
            except ValueError:  # the architecture has another attention only
                model = classes.from_pretrained(where, **known)
            if form == "adapter":
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(folder))
        except FlexpError:
            raise
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{folder}: the exported model cannot be loaded ({first}); export it again") from error
    return model.eval()


def _answering(model: Any) -> Forward:
    def forward(batch: Mapping[str, Tensor]) -> Any:
        model.train(False)
        with torch.no_grad():
            return model(**batch)

    return forward
