"""Opening a personal language model to write with: of a run, of an exported folder, or with its middle on a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexp.assets import resolve
from flexp.client.generation import SplitGenerator
from flexp.client.model import SplitModel, SplitModelForCausalLM
from flexp.config import RunConfig
from flexp.data.tasks.base import fields
from flexp.data.tasks.instruction import TEMPLATE
from flexp.errors import ConfigError, StorageError
from flexp.export.client_folder import ClientFolder, middle, open_client
from flexp.export.facts import FILE
from flexp.export.saved import LAST, is_run, open_run, run_config
from flexp.export.usable import of_folder
from flexp.export.whole import merged
from flexp.files import read_json
from flexp.links.base import Link
from flexp.methods.base import method_of
from flexp.methods.split import Split
from flexp.run import checkpoints
from flexp.run.folder import is_client
from flexp.run.settle import load_processor, model_folder
from flexp.serving.writer import Writer

WRITING = ("causal-lm", "instruction", "multiple-choice")


def open_writer(
    place: Path, client: str | None = None, which: str = LAST, connect: Callable[[str], Link] | None = None
) -> Writer:
    """The personal model in ``place``, a run, what ``flexp client`` leaves or an exported folder, ready to write.

    Args:
        which: of a run: after which round; of a client's folder: a snapshot.
        connect: gives a link of the client that is named to a running server, for the blocks that are not the client's
            own; of a run or a client's folder only. It is called again when a link breaks.

    Raises:
        FlexpError: there is no such model, or it writes no text.
    """
    if is_client(place):
        return _of_client(open_client(place, client), middle(place, connect), which)
    if not is_run(place):
        if connect is not None and (place / FILE).is_file():
            raise ConfigError(f"{place} holds a whole model: leave out --server, or name the run")
        return _of_folder(place, client)
    config = run_config(place)
    if config.data.task not in WRITING:
        raise ConfigError(f"the models of {place} write no text: their task is {config.data.task}; use flexp predict")
    return _of_run(place, client, which) if connect is None else _of_server(place, config, client, which, connect)


def _of_client(opened: ClientFolder, connect: Callable[[str], Link], which: str) -> Writer:
    if opened.config.data.task not in WRITING:
        raise ConfigError(
            f"the model of {opened.folder} writes no text: its task is {opened.config.data.task}; use flexp predict"
        )

    def reach() -> Link:
        return connect(opened.client)

    taken, tokenizer = opened.taken(which), opened.processor()
    return _split_writer(opened.client, opened.split(taken, reach()), reach, tokenizer, opened.config)


def _split_writer(name: str, split: SplitModel, reach: Callable[[], Link], tokenizer: Any, config: RunConfig) -> Writer:
    return Writer(
        name,
        tokenizer,
        SplitGenerator(split, reach),
        split.config,
        prompt=_prompt(config.data),
        about=f"split at {split.cut}, its middle on a server",
        close=lambda: split.link.close(),
    )


def _of_folder(place: Path, client: str | None) -> Writer:
    usable = of_folder(place, client)
    if usable.data.task not in WRITING:
        raise ConfigError(f"the model in {place} writes no text: its task is {usable.data.task}; use flexp predict")
    model = usable.model
    tokenizer = load_processor(str(place), RunConfig.model_validate({"model": {"id": str(place)}, "data": usable.data}))
    return Writer(usable.client, tokenizer, model, model.config, prompt=_prompt(usable.data), about="the whole model")


def _of_run(place: Path, client: str | None, which: str) -> Writer:
    run = open_run(place, which)
    name = run.client(client).name
    method, config = run.method, run.config
    if isinstance(method, Split):
        split: Any = method.clients[name].model
        model: Any = SplitGenerator(split)
        about = f"split at {split.cut}, both sides in this process"
    else:
        lora = method.world.config.model.lora
        model = merged(run.world.source, method.trained_weights(name), lora.alpha / lora.rank)
        about = "the whole model"
    tokenizer = load_processor(model_folder(config), config)
    whole = run.world.source.model.config
    return Writer(name, tokenizer, model, whole, prompt=_prompt(config.data), about=about, close=method.close)


def _of_server(
    place: Path, config: RunConfig, client: str | None, which: str, connect: Callable[[str], Link]
) -> Writer:
    """Only the client's own part of the model is loaded, and of the checkpoint only its own file is read."""
    if not method_of(config).recuts:
        raise ConfigError(f"--server needs a split model, and the method of {place} is {config.method.name}")
    name, cut = _cut_of(place, client)
    found = checkpoints.kept(place / "checkpoints")
    number = max(found, default=0) if which == LAST else int(which) if which.isdecimal() else -1
    if number not in found:
        there = ", ".join(map(str, found)) or "none"
        raise StorageError(f"{place} has no checkpoint of round {which}; it has those of round {there}")
    state = checkpoints.load_party(found[number], f"client-{name}")
    if state is None:
        raise StorageError(f"{found[number]} has no state of client {name}")
    model_id = str(resolve(config.model.id))
    tokenizer = load_processor(model_id, config)

    def reach() -> Link:
        return connect(name)

    split = SplitModelForCausalLM.from_pretrained(config.model.at(model_id), cut=cut, link=reach(), seed=config.seed)
    prefix = "personal/"
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    split.load_personal_state(own)
    return _split_writer(name, split, reach, tokenizer, config)


def _cut_of(place: Path, client: str | None) -> tuple[str, tuple[int, int]]:
    """Of the run's own summary, so that nobody's data need be there."""
    path = place / "summary.json"
    try:
        cuts = {str(row["name"]): (int(row["cut"][0]), int(row["cut"][1])) for row in read_json(path)["clients"]}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StorageError(
            f"{path} does not tell the clients' cuts; run flexp report {place}, or train again"
        ) from error
    if client is None and len(cuts) == 1:
        client = next(iter(cuts))
    if client is None or client not in cuts:
        known = ", ".join(map(repr, list(cuts)[:16]))
        raise ConfigError(f"the run has no client {client!r}: say whose model with --client; it has {known}")
    return client, cuts[client]


def _prompt(data: Any) -> str | None:
    """What stands for a chat template in a model that was tuned to follow instructions."""
    template = data.template or TEMPLATE
    if data.task != "instruction" or len(fields(template)) != 1:
        return None
    return str(template).replace("{" + fields(template)[0] + "}", "{prompt}")
