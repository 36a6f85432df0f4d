"""From a configuration to a client that works: its data, its stage, its link and its place for what it saves."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flexp.assets import resolve
from flexp.client.model import SplitModel
from flexp.client.recut import move_party
from flexp.client.trainer import Trainer
from flexp.config import CodecConfig, DeploymentConfig, RunConfig
from flexp.data import load_federation
from flexp.data.types import ClientData, Federation
from flexp.errors import ConfigError, DataError, LinkError, LinkLostError
from flexp.files import write_json
from flexp.links.base import Link
from flexp.methods.parties import own_config, own_trainer, split_model, tune_own
from flexp.models.loading import load_config
from flexp.models.parts import Part, check_cut
from flexp.models.stage import Stage
from flexp.report.metrics import MetricsLog, write_records
from flexp.report.metrics import read as read_log
from flexp.report.progress import Progress
from flexp.run.folder import write_facts
from flexp.run.moving import make_mover
from flexp.run.planned import with_cuts
from flexp.run.setup import client_cuts, load_part, load_processor, max_positions, own_pad
from flexp.run.store import SNAPSHOTS, Checkpoint, ParkedOnDisk, Store, party_of
from flexp.run.worker import Worker


@dataclass(frozen=True)
class Place:
    """What this machine has of the run: one client's examples, its cut, and the configuration as this client has it.

    Attributes:
        cut_is_given: by the user, who then wants no other one.
    """

    data: ClientData
    federation: Federation
    model_id: str
    cut: tuple[int, int]
    blocks: int
    pad: int | None
    config: RunConfig
    cut_is_given: bool = False


def find_place(config: RunConfig, name: str | None, cut: tuple[int, int | None] | None) -> Place:
    """Read the data, and take the part that is the client's.

    With a single client in the data (``flexp client --data``) all of it is, whatever its name.

    Raises:
        FlexpError: what is wrong with data or model; or there is no such client.
    """
    model_id = str(resolve(config.model.id))
    processor = load_processor(model_id, config)
    federation, blocks = _federation(config, model_id, processor)
    if cut is None:
        config, notes, _ = with_cuts(config, federation, blocks)
        federation = replace(federation, notes=[*federation.notes, *notes])
    cuts = client_cuts(config, federation, blocks) if cut is None else {}
    names = [client.name for client in federation.clients]
    if len(names) > 1 and name not in names:
        raise DataError(f"the data have no client {name}; expected one of {', '.join(names)} (--name)")
    index = names.index(name) if name in names else 0
    own = federation.clients[index]
    chosen = cuts[own.name] if cut is None else check_cut(cut, blocks, where="--cut")
    own = replace(own, name=name or own.name)
    pad = own_pad(federation.task.model_kind, processor)
    return Place(own, federation, model_id, chosen, blocks, pad, own_config(config, index), cut is not None)


def cuts_of(config: RunConfig) -> dict[str, tuple[int, int]]:
    """The cut of each client of the run, by name, its cuts being :func:`settled`.

    Raises:
        FlexpError: what is wrong with data, model or cuts.
    """
    model_id = str(resolve(config.model.id))
    return client_cuts(config, *_federation(config, model_id, load_processor(model_id, config)))


def settled(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """``config`` with planned cuts written out, so that all processes of a run have the same.

    Raises:
        FlexpError: what is wrong with data, model or plan.
    """
    if config.data.clients.plan is None and config.data.clients.cuts != "auto":
        return config
    model_id = str(resolve(config.model.id))
    found, notes, _ = with_cuts(config, *_federation(config, model_id, load_processor(model_id, config)))
    for note in notes:
        say(note)
    return found


def _federation(config: RunConfig, model_id: str, processor: Any) -> tuple[Federation, int]:
    """All clients' data, and the model's number of blocks."""
    model_config = load_config(model_id)
    federation = load_federation(config.data, processor, config.seed, max_positions(model_config))
    return federation, int(model_config.get_text_config().num_hidden_layers)


def make_client(
    config: RunConfig, place: Place, link: Link, numbering: int | None = None, codec: CodecConfig | None = None
) -> tuple[Trainer, SplitModel]:
    """The client that a simulation of ``config`` would have, loaded by itself and joined over ``link``.

    Raises:
        ModelError: the model cannot be loaded or split.
        LinkError: the server refuses.
    """
    task = place.federation.task
    stage = load_own(config, place, Part.client(place.cut, place.blocks))
    split = split_model(config, stage, place.cut, link, task.model_kind, codec=codec, numbering=numbering)
    return own_trainer(place.config, place.data, task, split, stage), split


def load_own(config: RunConfig, place: Place, part: Part) -> Stage:
    """A part of the pretrained model, tuned as this client's.

    Raises:
        ModelError: the model cannot be loaded or split.
    """
    task = place.federation.task
    stage = load_part(config, place.model_id, task.model_kind, task.label_names, place.pad, part)
    tune_own(stage, place.config)
    return stage


def run_client(
    config: RunConfig,
    deployment: DeploymentConfig,
    reach: Callable[[], Link],
    place: Place,
    state: Path,
    *,
    codec: CodecConfig | None = None,
    console: Console | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Take part in the run that the server conducts, going on from ``state`` if there is something; gives whether the
    run is over (or else was stopped, by a signal or by ``stop``).

    Args:
        codec: in what form tensors cross; ``None``: as the link does by itself (bfloat16 over a network).

    Raises:
        LinkError: the server refuses, or cannot be reached.
        ConfigError: ``state`` belongs to another client or cut.
        StorageError: it cannot be written, or is of another version of FlexP.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    snapshots = Store(state / SNAPSHOTS, deployment.keep)
    snapshots.claim()
    may_move = deployment.schedule == "free"
    newest = _known(snapshots, place, state, may_move=may_move)
    facts = {} if newest is None else newest.facts
    recuts = config.recut.on and may_move
    if recuts and facts and not place.cut_is_given:  # where it moved to
        place = replace(place, cut=(int(facts["cut"][0]), int(facts["cut"][1])))
    with Progress(
        config.train.total_steps, place.data.name, metric=place.federation.task.metric, console=console
    ) as diary:
        trainer, model = _joined(config, place, reach, facts.get("numbering"), codec, deployment.patience, diary.note)
        parking = ParkedOnDisk(state / "parked", model.steps.numbering)
        moved = newest is not None and newest.facts["cut"] != list(place.cut)
        if newest is not None and moved:
            new = move_party(trainer, newest.load(party_of(place.data.name)), parking)
            diary.note(
                f"{place.data.name}: from cut {tuple(facts['cut'])} to {place.cut}, {len(new)} parameters are new"
            )

        def blocks(part: Part) -> Stage:
            return load_own(config, place, part)

        log = MetricsLog(state / "metrics.jsonl")
        worker = Worker(
            config,
            place.data,
            place.federation.task,
            trainer,
            model,
            reach,
            snapshots=snapshots,
            log=log,
            diary=diary,
            run=str(facts.get("run", "")),
            patience=deployment.patience,
            blocks=blocks,
            mover=make_mover(place.config, place.federation, trainer, blocks, parking) if recuts else None,
            tell_cut=lambda cut: write_facts(state, place.data, place.federation, cut),
        )
        if newest is not None and moved:  # or the server, going back to that snapshot, would undo it
            worker.save(newest.number)
        write_json(state / "config.json", config.resolved())
        write_facts(state, place.data, place.federation, place.cut)
        try:
            with _signals(worker.stop, stop):
                over = worker.work()
        finally:
            log.close()
            _once_each(state / "metrics.jsonl")
            model.link.close()
        last = max(snapshots.numbers(), default=None)
        diary.note(f"{place.data.name}: {'the run is over' if over else 'stopped'} after {trainer.steps} steps; "
                   f"snapshot {last} is in {snapshots.folder}")  # fmt: skip
    return over


def _known(snapshots: Store, place: Place, state: Path, *, may_move: bool) -> Checkpoint | None:
    """The newest snapshot that is whole, if it is of this client; ``None``: there is none."""
    newest = snapshots.newest_whole(quarantine=True)
    if newest is None:
        return None
    facts = newest.facts
    if facts["client"] != place.data.name or (facts["cut"] != list(place.cut) and not may_move):
        raise ConfigError(
            f"{state} holds snapshots of {facts['client']} with cut {tuple(facts['cut'])}, not of {place.data.name} "
            f"with cut {place.cut}; give another --state"
            + ("" if may_move else " (a cut may change between sessions in a free run only)")
        )
    return newest


def _joined(
    config: RunConfig,
    place: Place,
    reach: Callable[[], Link],
    numbering: int | None,
    codec: CodecConfig | None,
    patience: float,
    note: Callable[[str], None],
) -> tuple[Trainer, SplitModel]:
    """The client, joined; the server may be started after its clients."""
    end, told = time.monotonic() + patience, False
    while True:
        try:
            return make_client(config, place, reach(), numbering, codec)
        except LinkLostError as error:
            if time.monotonic() > end:
                raise LinkError(f"{error}; gave up after {patience:g} s") from error
            if not told:
                note(f"{error}; waiting for it")
                told = True
            time.sleep(0.5)


def _once_each(path: Path) -> None:
    """A step or score that was done again after going back stands in the diary once, as it was the last time."""
    records = read_log(path)
    last = {(record["kind"], record.get("step", record["round"])): record for record in records}
    if len(last) < len(records):
        write_records(path, list(last.values()))


@contextmanager
def _signals(worker_stop: threading.Event, stop: threading.Event | None) -> Iterator[None]:
    if stop is not None:  # whoever embeds a client has signals of its own

        def pass_on() -> None:
            stop.wait()
            worker_stop.set()

        threading.Thread(target=pass_on, daemon=True).start()
        yield
        return
    earlier = {
        number: signal.signal(number, lambda *_: worker_stop.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
