"""A client that comes after training: it starts from what a run left, and trains its own parts on few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from flexp.client.model import SplitModel
from flexp.config import RunConfig
from flexp.config.loading import override, validate
from flexp.errors import ConfigError
from flexp.export import backup
from flexp.export.saved import SavedRun, open_run
from flexp.export.trained import LAST
from flexp.files import write_json
from flexp.methods.base import method_of
from flexp.methods.split import Split
from flexp.models.anatomy import check_cut
from flexp.report.progress import Progress
from flexp.report.summary import aggregate
from flexp.run import runner
from flexp.run.belonging import START, belonging, check_match
from flexp.run.folder import JOINED, JOINED_SCHEMA
from flexp.run.settle import joined_world

PRETRAINED: Final = "pretrained"
SHARED: Final = "shared"
MOST_NAME: Final = 200
"""Bytes of a newcomer's name: as a server that it connects to would have it."""
FREE = ("train", "evaluation", "output")
"""Tables that a newcomer may set for itself, besides :data:`FREE_DATA`."""
FREE_DATA = ("train_examples", "test_examples", "test_fraction", "validation_fraction", "private_seed")


def join(
    folder: Path,
    name: str,
    out: Path,
    *,
    data: str | None = None,
    start: Sequence[str] = (PRETRAINED,),
    middle: Literal["shared", "pretrained"] = SHARED,
    train_shared: bool = False,
    cut: tuple[int, int | None] | None = None,
    steps: int | None = None,
    every: int | None = None,
    settings: Sequence[str] = (),
    which: str = LAST,
    passphrase: str | None = None,
    progress: Callable[..., Progress] = Progress,
) -> dict[str, Any]:
    """Train a newcomer of the run in ``folder``, which stays as it is; ``out`` becomes a run of this one client.

    Args:
        name: of the newcomer.
        data: its file, with the columns of the run; ``None``: the rows of the client ``name`` in the run's own source,
            which ``data.clients.names`` left out.
        start: of its own head and tail: ``pretrained``; ``shared``, with the server's copies of the blocks that both
            have; or the personal parts of clients of the run, or in files of ``flexp state backup``, on average where
            there are several.
        middle: the run's shared blocks, or the pretrained ones, as if nobody had trained (to compare).
        train_shared: let the newcomer's gradients train the middle too; its folder keeps the result.
        cut: (s, e); without, the next one in the turn of the clients'.
        steps: optimiser steps; as many as a client of the run had without.
        every: score after so many steps; before and after all of them without.
        settings: ``key=value`` of the tables :data:`FREE` and keys of ``data`` in :data:`FREE_DATA`.
        passphrase: of an encrypted file in ``start``.

    Returns:
        The summary of the new run.

    Raises:
        ConfigError: the run has no shared blocks, or something does not fit it.
        FlexpError: what is wrong with run, data or disk.
    """
    runner.refuse_taken(out)
    run = open_run(folder, which)
    if not isinstance(run.method, Split):
        raise ConfigError(
            f"{folder}: the method {run.config.method.name} has no server whose blocks a newcomer could start from; "
            "flexp join needs a method that splits"
        )
    if run.method.server.own and (middle == SHARED or SHARED in start):
        raise ConfigError(
            f'{folder}: clients trained adapters of their own in the shared blocks (server.adapters = "own"), so there '
            "is no trained middle to share; say --middle pretrained, and --start with pretrained or a client"
        )
    if data is not None:  # else it is as the run's source says
        _check_name(name)
    if name in run.world.cuts:
        raise ConfigError(f"{name!r} is a client of {folder} already; choose another --name")
    begin = beginning(run, start, passphrase)
    config = _config(run, name, data, cut, steps, every, settings)
    facts = {
        "schema": JOINED_SCHEMA,
        "client": name,
        "labels": run.world.federation.task.label_names,
        "run": run.config.name,
        "round": run.round,
        "start": [Path(item).name for item in start],
        "middle": middle,
        "train_shared": train_shared,
        "others": aggregate(run.scored[run.round], run.world.federation.task.higher_is_better)
        if run.round in run.scored
        else None,
    }
    world = joined_world(config, facts)
    method = Split(world)
    if middle == SHARED:
        method.server.load(_shared_weights(method.server.state(), run.method.server.state()))
    if not train_shared:
        method.server.freeze()
    model = method.clients[name].model
    assert isinstance(model, SplitModel)
    own = model.personal_state()
    model.load_personal_state({key: begin.get(key, value).to(value.dtype) for key, value in own.items()})
    model.take_over()
    write_json(out / JOINED, facts)
    return runner.train(world, method, out, progress=progress)


def beginning(run: SavedRun, start: Sequence[str], passphrase: str | None = None) -> dict[str, Tensor]:
    """Weights from which a newcomer's own parts start, by name; what is not among them is pretrained.

    Raises:
        ConfigError: ``start`` names nothing of this run, or mixes what cannot be averaged.
        StorageError: a file is damaged.
    """
    if PRETRAINED in start or SHARED in start:
        if len(start) > 1:
            raise ConfigError(f"--start {' --start '.join(start)}: only clients and files are averaged; say one alone")
        return _of_server(run) if start[0] == SHARED else {}
    found = [_of_client(run, item, passphrase) for item in start]
    names = {name for weights in found for name in weights}
    mean = {}
    for name in names:
        values = [weights[name] for weights in found if name in weights]
        mean[name] = torch.stack([value.float() for value in values]).mean(0) if len(values) > 1 else values[0]
    return mean


def _of_client(run: SavedRun, item: str, passphrase: str | None) -> dict[str, Tensor]:
    if item in run.world.cuts:
        return run.method.trained_weights(item)
    if not Path(item).is_file():
        raise ConfigError(
            f"--start {item}: is neither {PRETRAINED}, {SHARED}, a client of the run ({', '.join(run.world.cuts)}), "
            "nor a file of flexp state backup"
        )
    found = backup.read(Path(item), passphrase)
    task = run.world.federation.task
    there = belonging(run.config, run.world.source, task.model_kind, task.label_names)
    mend = "start from parts that were trained alike, or from pretrained"
    check_match(found.facts, there, START, f"--start {item}", run.folder, mend)
    return _of_server(run) | found.weights


def _of_server(run: SavedRun) -> dict[str, Tensor]:
    assert isinstance(run.method, Split)
    parameters = run.method.server.shared.updater.parameters
    return {name: value.detach().clone() for name, value in parameters.items()}


def _shared_weights(fresh: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A server's state before its first step, with the weights of another that was trained.

    The optimiser begins anew, because the schedule of a finished run has ended.
    """
    weights = [name for name in fresh if name.startswith("shared/weights/")]
    missing = [name for name in weights if name not in trained]
    if missing:
        raise ConfigError(f"the cut needs blocks that the run's server does not have ({missing[0].rpartition('/')[2]})")
    return {**fresh, **{name: trained[name] for name in weights}}


def _config(
    run: SavedRun,
    name: str,
    data: str | None,
    cut: tuple[int, int | None] | None,
    steps: int | None,
    every: int | None,
    settings: Sequence[str],
) -> RunConfig:
    """The newcomer's own run: the same but for its data, its cut and its steps."""
    content = run.config.resolved()
    for setting in settings:
        table, _, rest = setting.partition(".")
        if table not in FREE and not (table == "data" and rest.partition("=")[0].strip() in FREE_DATA):
            known = ", ".join([*(f"{free}.…" for free in FREE), *(f"data.{key}" for key in FREE_DATA)])
            raise ConfigError(f"--set {setting}: a newcomer takes this from the run; it may set {known}")
        override(content, setting)
    assert isinstance(run.method, Split)
    base, stop = run.method.server.blocks
    start, end = check_cut(
        cut or _next_cut(run, name),
        run.world.source.anatomy.blocks,
        where="--cut",
    )
    if start < base or end > stop:
        raise ConfigError(f"--cut {start}:{end} does not fit: the run's server has the blocks [{base}, {stop})")
    total = run.world.total_steps if steps is None else steps
    size = every or total
    if total % size:
        raise ConfigError(f"--steps {total} must be a multiple of --every {size}")
    content["name"] = f"{run.config.name} + {name}"
    content["devices"] = {}
    content["model"]["base_depth"] = base
    content["train"] |= {"rounds": total // size, "steps_per_round": size}
    content["evaluation"] |= {"every": 1}
    clients = content["data"]["clients"]
    each = [{**one, "cut": None, "device": None} for one in clients["each"] if one["name"] in (None, name)]
    clients |= {"cut": [start, end], "device": None, "each": each}
    if data is None:
        _left_out(run, name)
        content["data"]["clients"] |= {"names": [name]}
    else:
        content["data"] |= {"source": _located(data), "test_source": None, "config": None, "split": None}
        content["data"]["clients"] |= {"by": "iid", "count": 1, "names": None, "over": None}
    return validate(content, "flexp join")


def _next_cut(run: SavedRun, name: str) -> tuple[int, int | None]:
    """What the newcomer would have had as one more client of the run; the first client's, where cuts were planned."""
    clients, cuts = run.config.data.clients, run.world.cuts
    if {one.name for one in clients.each if one.cut is not None} >= cuts.keys():  # each has a record of its own
        return next(iter(cuts.values()))
    own, blocks = clients.every([*cuts, name])[name].cut, run.world.source.anatomy.blocks
    assert own is not None, "there is a cut for all"
    every = {**cuts, name: check_cut(own, blocks, where="data.clients.cut")}
    return method_of(run.config).cuts(run.config, every, blocks)[name]


def _check_name(name: str) -> None:
    """Refuse what would be mistaken for something else, in a folder or beside the server. Raises ConfigError."""
    odd = name != name.strip() or not name.isprintable() or set(name) & set("/\\")
    if odd or name in ("", ".", "..", "server") or len(name.encode()) > MOST_NAME:
        raise ConfigError(
            f"--name {name[:MOST_NAME]!r}: is no name for a newcomer; expected 1 to {MOST_NAME} bytes of printable "
            "text without slashes, and not server"
        )


def _left_out(run: SavedRun, name: str) -> None:
    by = run.config.data.clients.by
    if by not in ("column", "file", "skew"):
        raise ConfigError(
            f"say the newcomer's file with --data FILE: clients of this run are no names in its source (by = {by!r})"
        )


def _located(data: str) -> str:
    return str(Path(data).resolve()) if Path(data).exists() else data
