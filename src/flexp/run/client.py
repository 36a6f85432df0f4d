"""A client as a process: it joins the server, goes on from what its folder holds, and works until the run is over."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from flexp.client.model import SplitModel
from flexp.client.recut import move_party
from flexp.client.trainer import Trainer
from flexp.client.watching import Watch
from flexp.config import CodecConfig, DeploymentConfig, PrivacyConfig
from flexp.data.split import check_same
from flexp.errors import ConfigError, FlexpError, LinkLostError, StoppedError
from flexp.files import read_json, write_json
from flexp.gaussian import kept_key
from flexp.links.base import Link
from flexp.report.metrics import MetricsLog, write_records
from flexp.report.metrics import read as read_log
from flexp.report.progress import Progress
from flexp.report.summary import VALIDATION
from flexp.run.diary import Diary, check_conducted
from flexp.run.folder import check_state, told, write_facts
from flexp.run.keeping import cache_notes
from flexp.run.party import Party, patiently
from flexp.run.settle import ClientSetup
from flexp.run.store import SNAPSHOTS, Checkpoint, ParkedOnDisk, Store, party_of
from flexp.signals import stopped_by_signal

if TYPE_CHECKING:
    from flexp.run.audited import OwnAudit
    from flexp.run.recutting import Mover

KEY_FILE = "privacy.key"


def run_client(
    setup: ClientSetup,
    deployment: DeploymentConfig,
    reach: Callable[[], Link],
    state: Path,
    *,
    codec: CodecConfig | None = None,
    console: Console | None = None,
    stop: threading.Event | None = None,
) -> bool:
    """Take part in the run that the server conducts, going on from ``state`` if there is something; gives whether the
    run is over (or else was stopped: by a signal, by ``stop``, or by the server, which stops itself).

    Args:
        codec: in what form tensors cross; ``None``: as the link does by itself (bfloat16 over a network).

    Raises:
        LinkError: the server refuses, or cannot be reached.
        ConfigError: ``state`` belongs to another client, cut or defence of labels, or to something else.
        DataError: the client's examples are not those that it was trained on.
        StorageError: it cannot be written, what was trained last too, or is of another version of FlexP.
    """
    config, name, federation = setup.config, setup.data.name, setup.run.federation
    check_conducted(config.train, deployment.schedule)
    check_state(state, server=False)
    _check_labels(state, config.privacy)
    snapshots = Store(state / SNAPSHOTS, deployment.keep)
    snapshots.claim()
    may_move = deployment.schedule == "free"
    newest = _known(snapshots, setup, state, may_move=may_move)
    facts = {} if newest is None else newest.facts
    recuts = config.recut.on and may_move
    if recuts and facts and not setup.cut_is_given:  # where it moved to
        setup = replace(setup, cut=(int(facts["cut"][0]), int(facts["cut"][1])))
    middle = setup.cut[0] < setup.run.blocks  # or else no activation leaves
    total, done = config.train.total_steps, int(facts.get("steps", 0))
    audits = config.privacy.audit and done < config.train.steps_per_round
    with (
        closing(snapshots),
        Progress(total, name, metric=federation.task.metric, done=done, console=console) as progress,
    ):
        audit = _audit(setup, state, progress.note) if audits else None
        if not middle:
            progress.note(f"{name} has all of the model: no activations, gradients or labels leave it")

        def reached() -> Link:
            return reach() if audit is None else audit.watched(reach())

        try:
            join = partial(setup.join, newest=newest, codec=codec, key=_key(setup, state))
            trainer, model = _joined(join, reached, deployment.patience, progress.note, stop)
        except StoppedError as error:
            progress.note(f"{name}: {error}")
            return False
        if audit is not None:
            audit.of(trainer)
        model.watch = Watch(lambda line: progress.note(f"{name}: {line}"))
        for line in cache_notes({name: trainer}):
            progress.note(line)
        moved = newest is not None and newest.facts["cut"] != list(setup.cut)
        if not moved:  # or else when the server has taken it so
            write_facts(state, setup.data, federation, setup.cut)  # first: it says that what follows is this client's
        parking = ParkedOnDisk(state / "parked", model.steps.numbering)
        if newest is not None and moved:
            new = move_party(trainer, newest.load(party_of(name)), parking)
            progress.note(f"{name}: from cut {tuple(facts['cut'])} to {setup.cut}, {len(new)} parameters are new")
        diary = Diary(MetricsLog(state / "metrics.jsonl"), progress)
        party = Party(
            setup,
            trainer,
            reached,
            snapshots=snapshots,
            diary=diary,
            run=str(facts.get("run", "")),
            patience=deployment.patience,
            mover=_mover(setup, trainer, parking) if recuts else None,
            moved=newest.number if newest is not None and moved else None,
            validated=_validated(state / "metrics.jsonl", federation.task.metric),
            tell_cut=lambda cut: write_facts(state, setup.data, federation, cut),
            first_round=(lambda: None) if audit is None else audit.attack,
        )
        write_json(state / "config.json", setup.run.config.resolved())
        try:
            with stopped_by_signal(stop) as stopped:
                over = party.work(stopped)
                party.settle()
        finally:
            progress.done = trainer.steps  # some may have been done again
            diary.close()
            _once_each(state / "metrics.jsonl")
            model.link.close()
        last = max(snapshots.numbers(), default=None)
        progress.note(f"{name}: {'the run is over' if over else 'stopped'} after {trainer.steps} steps; "
                   f"snapshot {last} is in {snapshots.folder}; {told(state)}")  # fmt: skip
    return over


def _validated(path: Path, metric: str) -> dict[int, float | None]:
    """The scores on validation data that the diary has, by round."""
    records = read_log(path) if path.is_file() else []
    return {int(r["round"]): r[VALIDATION].get(metric) for r in records if r["kind"] == "eval" and VALIDATION in r}


def _known(snapshots: Store, setup: ClientSetup, state: Path, *, may_move: bool) -> Checkpoint | None:
    """The newest snapshot that is whole, if it is of this client; ``None``: there is none."""
    newest = snapshots.newest_whole(quarantine=True)
    if newest is None:
        return None
    facts = newest.facts
    if facts["client"] != setup.data.name or (facts["cut"] != list(setup.cut) and not may_move):
        raise ConfigError(
            f"{state} holds snapshots of {facts['client']} with cut {tuple(facts['cut'])}, not of {setup.data.name} "
            f"with cut {setup.cut}; give another --state"
            + ("" if may_move else " (a cut may change between sessions in a free run only)")
        )
    mend = "going on could test with what was trained on: put the data back, or begin anew in another --state"
    check_same(facts.get("data"), setup.identity, state, mend)
    return newest


def _check_labels(state: Path, now: PrivacyConfig) -> None:
    """Refuse another defence of labels than the client began with: what both send tells more than either's bound."""
    if not (state / "config.json").is_file():
        return
    then = PrivacyConfig().model_dump() | read_json(state / "config.json").get("privacy", {})
    for key in ("gradients", "label_epsilon"):
        was, is_ = then[key], getattr(now, key)
        if was != is_:
            said = [f"privacy.{key} = {json.dumps(value)}" if value is not None else f"no privacy.{key}"
                    for value in (was, is_)]  # fmt: skip
            raise ConfigError(
                f"{state} was begun with {said[0]}, and now there is {said[1]} (privacy.max_label_auc chooses by the "
                "cuts): start it with the --cut and the settings of its first start, or name privacy.gradients and "
                "privacy.label_epsilon as its config.json has them, or give another --state"
            )


def _key(setup: ClientSetup, state: Path) -> int | None:
    """Of noise and of labels' answers, kept from before the first step on: a client that falls before its first
    snapshot would answer anew, and two answers tell more than one."""
    return kept_key(state / KEY_FILE, "this client's noise and labels") if setup.config.privacy.on else None


def _joined(
    join: Callable[[Link], tuple[Trainer, SplitModel]],
    reach: Callable[[], Link],
    patience: float,
    note: Callable[[str], None],
    stop: threading.Event | None,
) -> tuple[Trainer, SplitModel]:
    """The client, joined; the server may be started after its clients."""
    told = False

    def attempt() -> tuple[Trainer, SplitModel]:
        nonlocal told
        link: Link | None = None
        try:
            link = reach()
            return join(link)
        except FlexpError as error:
            if link is not None:
                link.close()  # a client has one stream at a time
            if isinstance(error, LinkLostError) and not told:
                note(f"{error}; waiting for it")
                told = True
            raise

    return patiently(attempt, patience, stop or threading.Event(), most=0.5)


def _once_each(path: Path) -> None:
    """A step or score that was done again after going back stands in the diary once, as it was the last time."""
    records = read_log(path)
    last = {(record["kind"], record.get("step", record["round"])): record for record in records}
    if len(last) < len(records):
        write_records(path, list(last.values()))


# What follows brings attacks, the planner and a server along: a second of processor, for who asks for it alone.


def _audit(setup: ClientSetup, state: Path, note: Callable[[str], None]) -> OwnAudit:
    from flexp.run.audited import OwnAudit

    return OwnAudit(setup, state, note)


def _mover(setup: ClientSetup, trainer: Trainer, parking: ParkedOnDisk) -> Mover:
    from flexp.run.recutting import Mover

    return Mover(setup, trainer, parking)
