"""A whole comparison: tune every method, run it with every seed, gather. Called again, it goes on where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flexp.comparison.cells import FOLDER, Cell, final_cell, fingerprint, is_done, tuning_cell
from flexp.comparison.collect import FILE, Track, diverged, gather, nobody_fits
from flexp.comparison.config import CompareConfig, Comparison, Entry, make
from flexp.comparison.engines import engine_of
from flexp.comparison.grid import Settings, trials, untried
from flexp.comparison.report.write import PAGES
from flexp.comparison.workers import Pool
from flexp.config import RunConfig
from flexp.config.loading import validate
from flexp.data.split import check_same, identity
from flexp.errors import ConfigError, DataError, StorageError
from flexp.files import check_free, read_json, storage_error, write_json
from flexp.models.fingerprint import weights_fingerprint
from flexp.run.settle import settle

PLAN = "plan.json"
"""What was asked for, with all defaults, and what data and weights the cells are made of."""


@dataclass
class Outcome:
    """What a comparison came to: the content of ``comparison.json``, and what is missing from it, one line each."""

    comparison: dict[str, Any]
    failures: list[str]
    done: int  # cells that this call did
    kept: int  # cells that were there already


class Watcher:
    """Is told what happens; see :class:`flexp.comparison.progress.Display` for one that shows it."""

    def plan(self, cells: int, cost: float, kept: int) -> None:
        """So many cells are to be done, ``kept`` are there already."""

    def began(self, cell: Cell) -> None:
        """A worker has it."""

    def ended(self, cell: Cell, problem: str | None) -> None:
        """It is done, or not, for that reason."""

    def chose(self, entry: Entry, settings: Settings) -> None:
        """Tuning of ``entry`` is over."""


def plan(comparison: Comparison) -> list[Track]:
    """Every entry's tuning cells, and the final cells of those that are not tuned; checks all configurations.

    Raises:
        ConfigError: a grid or a setting is not possible.
    """
    tracks = []
    for entry in comparison.entries:
        tried = trials(comparison, entry)
        tuning = [
            tuning_cell(comparison, entry, number, settings, seed)
            for number, settings in enumerate(tried)
            for seed in comparison.tune_seeds
        ]
        track = Track(entry, tried, tuning)
        if not tried:
            _choose(comparison, track, untried(comparison, entry))
        tracks.append(track)
    return tracks


def compare(
    comparison: Comparison, out: Path, jobs: int, watcher: Watcher | None = None, engine: str = "local"
) -> Outcome:
    """Do in ``out`` whatever is not done there yet, and write ``comparison.json``.

    A cell that fails is noted and the others go on.

    Args:
        jobs: cells at the same time.
        engine: who does them: ``local`` or as :func:`flexp.comparison.engines.engine_of`.

    Raises:
        ConfigError: the configuration is impossible, ``out`` holds something else, or there is no such engine.
        DataError: data or weights are not those of the cells that are there.
        StorageError: another process is at work in ``out``.
    """
    watcher = watcher or Watcher()
    tracks = plan(comparison)
    if (out / "config.json").exists():
        raise ConfigError(f"{out} holds a run: choose another --out for the comparison")
    if not _is_comparison(out):
        check_free(out, (PLAN, FILE, FOLDER, *PAGES), "a comparison")
    with _alone(out):
        files = _files(comparison.base, out)
        asked = {"base": comparison.base.resolved(), "compare": comparison.config.model_dump()}
        write_json(out / PLAN, {**asked, "made_of": _known_data(comparison.base, out)})
        state = _State(comparison, out, watcher, tracks)
        needs = comparison.config.needs
        here = Pool(jobs, out) if engine == "local" else engine_of(engine, jobs, out, needs)
        with here as pool:
            while state.waiting or pool.busy:
                while state.waiting and pool.free:
                    cell = state.next()
                    watcher.began(cell)
                    pool.give(cell)
                for cell, problem in pool.take():
                    if problem is None and _files(comparison.base, out) != files:
                        aside = _aside(out / cell.folder)  # nobody knows which it has read
                        problem = (
                            "the files of data or model were changed meanwhile; put them back, and compare again "
                            f"(what was trained is in {aside})"
                        )
                    state.ended(cell, problem)
        content = gather(comparison, out, tracks)
        return Outcome(content, [*state.failures, *diverged(content)], state.done, state.kept)


def _is_comparison(out: Path) -> bool:
    found = read_json(out / PLAN) if (out / PLAN).is_file() else None
    return isinstance(found, dict) and found.keys() - {"made_of"} == {"base", "compare"}


def _known_data(base: RunConfig, out: Path) -> dict[str, Any]:
    """What the cells of ``base`` are made of, by what of the configuration it depends on; the folder may have others.

    Raises:
        DataError: with that configuration the folder's cells had other data or weights, which new ones do not go with.
    """
    known: dict[str, Any] = read_json(out / PLAN).get("made_of", {}) if (out / PLAN).is_file() else {}
    # Seeds and tuning draw from all rows of a client.
    whole = base.model_copy(update={"data": base.data.model_copy(update={"train_examples": None})})
    found = settle(whole, plan=False)
    now: dict[str, Any] = {
        "weights": weights_fingerprint(found.model_id),
        "data": identity(found.federation.clients, found.federation.task.label_names),
    }
    key = fingerprint(RunConfig(model=base.model, data=whole.data, seed=base.seed))
    then, mend = known.get(key, now), "put them back, or choose another --out"
    check_same(then["data"], now["data"], out, mend, "cells that are there")
    if then["weights"] != now["weights"]:
        raise DataError(f"{out}: the weights of {base.model.id} are not those of the cells that are there; {mend}")
    return {**known, key: now}


def _aside(folder: Path) -> Path:
    """Rename a cell's folder to what no cell is called."""
    number = 1
    while (place := folder.with_name(f"{folder.name}-changed-{number}")).exists():
        number += 1
    return folder.rename(place)


def _files(base: RunConfig, out: Path) -> list[tuple[Path, int, int]]:
    """The files of data and model on this machine, with sizes and times of their last change; without those in ``out``,
    which may lie beside them."""
    found = []
    for source in filter(None, (base.data.source, base.data.test_source, base.model.id)):
        place = Path(source if Path(source).exists() else source.partition("#")[0]).expanduser()
        for path in (place, *sorted(place.rglob("*"))):
            if path.is_file() and out.resolve() not in path.resolve().parents:
                found.append((path, path.stat().st_size, path.stat().st_mtime_ns))
    return found


def regather(out: Path) -> dict[str, Any]:
    """Write ``comparison.json`` anew from the cells that are finished in ``out``, running none.

    Raises:
        StorageError: ``out`` holds no comparison.
    """
    if not _is_comparison(out):
        raise StorageError(f"{out}: has no {PLAN} of a comparison; expected the folder of one (flexp compare --out)")
    content = read_json(out / PLAN)
    base = validate(content["base"], str(out / PLAN))
    comparison = make(base, CompareConfig.model_validate(content["compare"]))
    tracks = plan(comparison)
    for track in tracks:
        best = choose(out, track) if track.chosen is None else None
        if best is not None:
            _choose(comparison, track, best)
            if not all(is_done(cell, out) for cell in track.tuning) and not any(is_done(c, out) for c in track.final):
                track.chosen, track.final = None, []  # tuning goes on
    return gather(comparison, out, tracks)


class _State:
    """What is waiting, and what follows from what has ended."""

    def __init__(self, comparison: Comparison, out: Path, watcher: Watcher, tracks: list[Track]) -> None:
        self.comparison, self.out, self.watcher = comparison, out, watcher
        self.waiting: list[Cell] = []
        self.failures: list[str] = []
        self.done = self.kept = 0
        self._tracks = {track.entry.name: track for track in tracks}
        self._open: dict[str, set[Path]] = {}
        for track in tracks:
            self._open[track.entry.name] = {cell.folder for cell in track.tuning if not self._queue(cell)}
            if track.tuning:
                self._tuned(track)
            else:
                for cell in track.final:
                    self._queue(cell)
        seeds = len(comparison.seeds)
        later = [
            cell.cost
            for track in tracks
            if track.chosen is None and not track.nobody_fits
            for cell in track.tuning[:1]
            for _ in range(seeds)
        ]
        waiting = [cell.cost for cell in self.waiting]
        watcher.plan(len(waiting) + len(later), sum(waiting) + sum(later), self.kept)

    def next(self) -> Cell:
        """Tuning first, as more waits for it; then the longest."""
        cell = min(self.waiting, key=lambda cell: (cell.purpose != "tune", -cell.cost))
        self.waiting.remove(cell)
        return cell

    def ended(self, cell: Cell, problem: str | None) -> None:
        self.watcher.ended(cell, problem)
        if problem is None:
            self.done += 1
        else:
            self.failures.append(f"{cell.name}: {problem}")
        track = self._tracks[cell.entry]
        if cell.purpose == "tune":
            self._open[cell.entry].discard(cell.folder)
            self._tuned(track)

    def _queue(self, cell: Cell) -> bool:
        """Whether it is done already; else it waits."""
        done = is_done(cell, self.out)
        if done:
            self.kept += 1
        else:
            self.waiting.append(cell)
        return done

    def _tuned(self, track: Track) -> None:
        if self._open[track.entry.name] or track.chosen is not None:
            return
        best = choose(self.out, track)
        track.nobody_fits = nobody_fits(track.tuning, self.out)
        if track.nobody_fits:
            return
        if best is None:
            self.failures.append(f"{track.entry.name}: no trial could be finished, so that it is left out")
            return
        _choose(self.comparison, track, best)
        self.watcher.chose(track.entry, best)
        for cell in track.final:
            self._queue(cell)


def choose(out: Path, track: Track) -> Settings | None:
    """The trial with the best validation score, by loss among equals, the earliest of the still equal ones."""
    ranked = []
    for number, found in enumerate(track.scores(out)):
        if found is not None:
            score, loss, higher = found
            ranked.append((-score if higher else score, loss, number))
    return track.tried[min(ranked)[2]] if ranked else None


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two processes that do the same cells would spoil them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(out, error) from error
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StorageError(
            f"{out}: another flexp compare is at work there; wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _choose(comparison: Comparison, track: Track, settings: Settings) -> None:
    track.chosen = settings
    track.final = [final_cell(comparison, track.entry, settings, seed) for seed in comparison.seeds]
