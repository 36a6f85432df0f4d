"""A cell: one run of one method with one seed, in a folder named after its configuration, done once and kept.

The folder is an ordinary run's (``flexp report`` and ``flexp run --resume`` work on it). A cell whose ``summary.json``
says *finished* is not run again; one that was stopped goes on from its last checkpoint; another configuration is
another cell.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexp.comparison.config import Comparison, Entry
from flexp.comparison.grid import Settings, apply
from flexp.config import PrivacyConfig, RunConfig
from flexp.config.loading import validate
from flexp.errors import FlexpError, StorageError
from flexp.files import read_json, write_json
from flexp.finite import UNDEFINED
from flexp.methods.base import method_of
from flexp.report.metrics import Record, read
from flexp.report.summary import VALIDATION

FOLDER = "cells"
MEMORY = "memory"
"""Measurements of clients' peak memory, shared by all cells."""
DIVERGED = "diverged.json"
"""In the folder of a tuning cell whose training could not go on: a result too, and not tried again."""
DROPPED = "dropped.json"
"""In the folder of a cell that no client's device can hold: a result as well."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        entry: the name of what is compared.
        folder: relative to the comparison's folder.
        trial: which of the entry's trials, when tuning.
    """

    entry: str
    purpose: Literal["tune", "final"]
    seed: int
    settings: Settings
    config: RunConfig
    folder: Path
    trial: int = 0

    @property
    def name(self) -> str:
        """For people."""
        what = f"trial {self.trial + 1}, " if self.purpose == "tune" else ""
        return f"{self.entry}, {what}seed {self.seed}"

    @property
    def cost(self) -> float:
        """Relative time that it takes, guessed."""
        train = self.config.train
        return train.total_steps * train.batch_size * method_of(self.config).effort


def tuning_cell(comparison: Comparison, entry: Entry, trial: int, settings: Settings, seed: int) -> Cell:
    """A run on a part of every client's private examples, scored on the rest of them after the last round.

    No choice ever looks at test data: one example per client is scored, as a run wants some, and nobody reads it.
    """
    base = comparison.base
    changes: Settings = {
        "data.validation_fraction": base.data.validation_fraction or comparison.config.validation_fraction,
        "data.test_examples": 1,
        "evaluation.global_examples": 1,
        "evaluation.every": base.train.rounds,
        "evaluation.measure_memory": False,
        "output.checkpoint_every": 0,
    }
    return _cell(comparison, entry, "tune", settings, seed, changes, trial)


def final_cell(comparison: Comparison, entry: Entry, settings: Settings, seed: int) -> Cell:
    """A run on all private examples. A client's peak memory is measured with the first seed only, and equal clients of
    several methods once."""
    base = comparison.base
    changes: Settings = {
        "data.validation_fraction": 0.0,
        "evaluation.measure_memory": base.evaluation.measure_memory and seed == comparison.seeds[0],
        "output.checkpoint_every": max(1, base.train.rounds // 3),
    }
    return _cell(comparison, entry, "final", settings, seed, changes)


def is_done(cell: Cell, out: Path) -> bool:
    """Whether there is nothing left to do, going by the cell's folder."""
    folder = out / cell.folder
    if cell.purpose == "tune" and (folder / DIVERGED).exists():
        return True
    if dropped(cell, out):
        return True
    if not (folder / "summary.json").exists():
        return False
    try:
        return bool(read_json(folder / "summary.json")["finished"]) and _holds(cell, folder)
    except (StorageError, KeyError, TypeError):
        return False


def execute(cell: Cell, out: Path, threads: int) -> None:
    """Run the cell, or go on with it, in this process.

    Raises:
        FlexpError: what is wrong with the configuration, model, data or disk, or, in a final run, training diverged.
            That no client's device can hold the method is no error but a result.
    """
    from functools import partial

    from rich.console import Console

    from flexp.errors import BadValuesError, TrainingError
    from flexp.report.progress import Progress
    from flexp.run import runner
    from flexp.run.participants import NobodyFitsError
    from flexp.run.store import CHECKPOINTS, Store

    folder = out / cell.folder
    if folder.exists() and (not _holds(cell, folder) or not Store(folder / CHECKPOINTS).numbers()):
        shutil.rmtree(folder)  # another version's defaults, or nothing that could be gone on with
    folder.mkdir(parents=True, exist_ok=True)
    config = cell.config.model_copy(update={"threads": threads})
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        progress = partial(Progress, console=Console(file=log, width=120))
        try:
            if (folder / "config.json").exists():
                runner.resume(folder, progress=progress, memory_cache=out / MEMORY)
            else:
                runner.run(config, folder, progress=progress, memory_cache=out / MEMORY)
        except (TrainingError, BadValuesError) as error:  # the second: as the server saw it, before it was too late
            if cell.purpose != "tune":
                raise
            write_json(folder / DIVERGED, {"error": str(error)})
        except NobodyFitsError as error:
            write_json(folder / DROPPED, {"config": config.resolved(), "clients": error.dropped, "error": str(error)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # gigabytes, and nobody goes on from them


def validation(cell: Cell, out: Path) -> tuple[float, float] | None:
    """Mean over clients of score and loss on validation data after the last round; who has nothing to score is in no
    mean of scores.

    ``None`` if training diverged, or no client's device can hold the method.
    """
    if (out / cell.folder / DIVERGED).exists() or dropped(cell, out):
        return None
    summary = read_json(out / cell.folder / "summary.json")
    records, metric = read(out / cell.folder / "metrics.jsonl"), summary["metric"]
    last = [record[VALIDATION] for record in last_scores(records)]
    scores = [own[metric] for own in last if metric not in own.get(UNDEFINED, ())]
    losses = [own["loss"] for own in last]
    if not scores or any(value is None for value in [*scores, *losses]):
        return None
    return statistics.fmean(scores), statistics.fmean(losses)


def dropped(cell: Cell, out: Path) -> list[dict[str, Any]]:
    """All clients of a cell that no client's device can hold, with the bytes that tell why; else none."""
    path = out / cell.folder / DROPPED
    if not path.exists():
        return []
    try:
        content = read_json(path)
        clients: list[dict[str, Any]] = content["clients"]
        return clients if _same_work(validate(content["config"], str(path)), cell.config) else []
    except (FlexpError, KeyError, TypeError):
        return []


def last_scores(records: list[Record]) -> list[Record]:
    """The ``eval`` records of the last evaluated round."""
    scored = [record for record in records if record["kind"] == "eval"]
    last = max((int(record["round"]) for record in scored), default=0)
    return [record for record in scored if int(record["round"]) == last]


def fingerprint(config: RunConfig) -> str:
    """Short, and equal for equal work: whatever differs from the defaults, but for names, threads and output."""
    content = config.model_dump(mode="json", exclude_defaults=True, exclude={"name", "threads", "output"})
    if config.method.meet.on == "auto":  # not what older runs with these settings did, which met only where asked
        content["meets"] = "auto"
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _holds(cell: Cell, folder: Path) -> bool:
    """Whether the folder's run is this cell's work, by its whole configuration."""
    try:
        found = validate(read_json(folder / "config.json"), str(folder))
    except FlexpError:
        return False
    return _same_work(found, cell.config)


def _same_work(found: RunConfig, asked: RunConfig) -> bool:
    """Whether the same is computed; what was left to the run (plans, defences, meetings), ``found`` says."""
    names = [own.name or "" for own in found.data.clients.each]
    blank = dict.fromkeys(("cut", "micro_batch", "checkpointing", "codec"), [None] * len(names))

    def work(config: RunConfig) -> dict[str, Any]:
        if asked.data.clients.planned:
            config = config.with_clients(config.data.clients.written(names, **blank))
        content = config.model_dump(mode="json", exclude={"name", "threads", "output"})
        if asked.data.clients.cut == "auto" and asked.privacy.max_content_words is not None:
            for name in set(PrivacyConfig.DEFENCE) - asked.privacy.model_fields_set:
                content["privacy"][name] = None
            if "pooling" not in asked.model.model_fields_set:
                content["model"]["pooling"] = None
        if asked.method.meet.on == "auto":
            content["method"]["meet"]["on"] = "auto"
        return content

    return work(found) == work(asked)


def _cell(
    comparison: Comparison,
    entry: Entry,
    purpose: Literal["tune", "final"],
    settings: Settings,
    seed: int,
    changes: Settings,
    trial: int = 0,
) -> Cell:
    base = comparison.base
    common: Settings = {
        "name": f"{base.name}: {entry.name}",
        "method.name": entry.method,
        "seed": seed,
        "data.seed": base.seed if base.data.seed is None else base.data.seed,  # the same clients and test rows
        "data.private_seed": seed,
        "output.html": False,
        "output.tensorboard": False,
    }
    config = apply(base, {**settings, **changes, **common}, f"compare, {entry.name}")
    folder = Path(FOLDER) / entry.name / f"{purpose}-seed-{seed}-{fingerprint(config)}"
    return Cell(entry.name, purpose, seed, settings, config, folder, trial)
