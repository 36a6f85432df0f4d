"""The run's diary for trackers: as TensorBoard events, one TensorBoard run a client, so that clients lie over one
another in one chart; and for what else was asked for. MLflow and Weights & Biases have one run for all, in which a
client's figures are called ``NAME/train/loss``; where they go is their own business (``MLFLOW_TRACKING_URI``,
``WANDB_MODE=offline``): without an address MLflow writes into the run's folder.

``events/federation`` has the means over the clients scored in a round, traffic and clock by **round**;
``events/NAME`` has a client's losses and scores by its **own steps** (a score after a round stands at the
client's last step of that round).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import tracking

from flexp.config import RunConfig
from flexp.errors import ConfigError, StorageError
from flexp.files import folder_name, read_json, storage_error, write_json
from flexp.report.metrics import Record

FEDERATION = "federation"
MOST_CLIENTS = 64
"""Clients with events of their own (each takes a file and a thread); the rest are in the means only."""


class EventWriter:
    """Writes records of ``metrics.jsonl`` as events under ``folder``.

    Args:
        folder: the run's ``events`` folder.
        kept: when a run resumes, the records that its diary keeps (after ``truncate_after``); events later
            than these are purged, so that no curve doubles back. None: a new run.
        others: further trackers.
        tensorboard: whether there are events.

    Raises:
        StorageError: the events cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        kept: Iterable[Record] | None = None,
        others: Sequence[OneRun] = (),
        *,
        tensorboard: bool = True,
    ) -> None:
        self.folder, self._others, self._files = Path(folder), others, tensorboard
        self._writers: dict[str, Any] = {}
        self._steps: dict[str, int] = {}
        self._scores: dict[str, dict[str, float]] = {}
        self._scored: dict[str, set[str]] = {}
        self._round = -1
        self._closed = False
        self._resumed = kept is not None
        for record in kept or ():
            self._round = max(self._round, int(record.get("round", 0)))
            if record.get("kind") == "step":
                self._steps[record["client"]] = int(record["step"])
        self._purge = {**{name: step + 1 for name, step in self._steps.items()}, FEDERATION: self._round + 1}

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record; unknown kinds are ignored."""
        if self._closed:
            raise StorageError(f"{self.folder}: the events are closed; open a new writer to go on")
        kind = record.get("kind")
        try:
            if kind == "step":
                self._write_step(record)
            elif kind == "eval":
                self._write_eval(record)
            elif kind == "round":
                self._write_round(record)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def close(self) -> None:
        """Flush and close every file, also when one of them fails; closing twice does no harm."""
        if self._closed:
            return
        self._closed = True
        failure: OSError | None = None
        self._flush_scores()
        for writer in (*self._writers.values(), *self._others):
            try:
                writer.finish()
            except OSError as error:
                failure = failure or error
        self._writers.clear()
        if failure is not None:
            raise storage_error(self.folder, failure) from failure

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_step(self, record: Mapping[str, Any]) -> None:
        client, step = str(record["client"]), int(record["step"])
        self._steps[client] = step
        values = {
            "train/loss": record.get("loss"),
            "train/alignment": record.get("align"),
            "train/lr": record.get("lr"),
        }
        if record.get("seconds"):
            values["train/tokens_per_second"] = record.get("tokens", 0) / record["seconds"]
        self._add(client, values, step)

    def _write_eval(self, record: Mapping[str, Any]) -> None:
        client, round = str(record["client"]), int(record["round"])
        if round != self._round:
            self._flush_scores()
            self._round = round
        for side in ("personal", "global", "validation"):
            scores = {
                f"{side}/{key}": value
                for key, value in (record.get(side) or {}).items()
                if key != "n" and isinstance(value, int | float)
            }
            self._add(client, scores, self._steps.get(client, 0))
            if record.get(side):
                self._scored.setdefault(side, set()).add(client)
            for tag, value in scores.items():
                self._scores.setdefault(tag, {})[client] = float(value)

    def _write_round(self, record: Mapping[str, Any]) -> None:
        round = int(record["round"])
        self._flush_scores()
        self._round = round
        keys = ("seconds", "bytes_up", "bytes_down")
        self._add(FEDERATION, {f"federation/{key}": record.get(key) for key in keys}, round)
        for tracker in self._writers.values():
            tracker.writer.flush()

    def _flush_scores(self) -> None:
        # A client without a score is no reason to leave it out: the mean of the others would flatter.
        means = {
            f"{tag}_mean": sum(clients.values()) / len(clients)
            for tag, clients in self._scores.items()
            if clients.keys() == self._scored[tag.split("/")[0]]
        }
        self._scores.clear()
        self._scored.clear()
        if means:
            self._add(FEDERATION, means, self._round)

    def _add(self, name: str, values: Mapping[str, Any], step: int) -> None:
        numbers = {tag: float(value) for tag, value in values.items() if isinstance(value, int | float)}
        if (writer := self._writer(name)) is not None:
            writer.log(numbers, step=step)
        for other in self._others if numbers else ():
            other.log(name, numbers, step)

    def _writer(self, name: str) -> Any:
        if not self._files:
            return None
        if name not in self._writers:
            if name != FEDERATION and len(self._writers) > MOST_CLIENTS:
                return None
            place = FEDERATION if name == FEDERATION else _of_client(name)
            purge = self._purge.get(name, 0) if self._resumed else None
            self._writers[name] = event_files(self.folder, place, purge)
        return self._writers[name]


def writer_of(out: Path, config: RunConfig, kept: Iterable[Record] | None) -> EventWriter | None:
    """What ``[output]`` asks for, of the run in the folder ``out``; ``None``: nothing.

    Raises:
        ConfigError: a tracker is not installed, or cannot begin.
    """
    wanted = config.output
    if not wanted.tensorboard and not wanted.report_to:
        return None
    settings = {
        "method": config.method.name,
        "model": Path(config.model.id).name if Path(config.model.id).exists() else config.model.id,
        "task": config.data.task,
        "seed": config.seed,
        "rounds": config.train.rounds,
        "lr": config.train.personal.lr,
    }
    others = [OneRun(kind, out, config.name, settings) for kind in dict.fromkeys(wanted.report_to)]
    return EventWriter(out / "events", kept, others, tensorboard=wanted.tensorboard)


def _of_client(name: str) -> str:
    """Its folder, which is never that of all."""
    found = folder_name(name)
    return f"{found}~" if found.lower() == FEDERATION else found


PROJECT = "flexp"
"""The experiment of MLflow, and the project of Weights & Biases."""
FILE = "trackers.json"
"""Beside the run: under which identity it was begun, for whoever resumes it."""


class OneRun:
    """A tracker with one run for all clients.

    Args:
        kind: ``mlflow`` or ``wandb``.
        folder: the run's.
        settings: written down when the run begins.

    Raises:
        ConfigError: the package is not there, or the tracker cannot begin.
    """

    def __init__(self, kind: str, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.kind = kind
        if not {"mlflow": tracking.is_mlflow_available, "wandb": tracking.is_wandb_available}[kind]():
            raise ConfigError(f"output.report_to: {kind} is not installed: pip install 'flexp[trackers]'")
        known = read_json(folder / FILE) if (folder / FILE).is_file() else {}
        try:
            self._tracker = self._begin(folder, name, known.get(kind))
            if kind not in known:
                self._tracker.store_init_configuration(dict(settings))
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"output.report_to: {kind} cannot begin ({first})") from error
        run = self._tracker.tracker
        write_json(folder / FILE, {**known, kind: run.info.run_id if kind == "mlflow" else run.id})

    def _begin(self, folder: Path, name: str, known: str | None) -> Any:
        tracker: Any
        if self.kind == "mlflow":
            import mlflow

            if "MLFLOW_TRACKING_URI" not in os.environ:
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no data base
                mlflow.set_tracking_uri((folder / "mlruns").absolute().as_uri())
            tracker = tracking.MLflowTracker(PROJECT, run_id=known, run_name=None if known else name)
        else:
            tracker = tracking.WandBTracker(PROJECT, name=name, dir=str(folder), id=known, resume="allow")
        tracker.start()
        return tracker

    def log(self, whose: str, values: Mapping[str, float], step: int) -> None:
        """Figures of a client, or of all, at its own step."""
        named = {f"{whose}/{key}": value for key, value in values.items()}
        if self.kind == "mlflow":  # which allows few signs in names
            self._tracker.log({re.sub(r"[^\w./ -]", "-", key): value for key, value in named.items()}, step=step)
        else:  # whose own steps only rise, while every client counts its own
            self._tracker.log({**named, f"{whose}/step": step})

    def finish(self) -> None:
        """The run is over, or stopped."""
        self._tracker.finish()


def event_files(folder: Path, name: str, purge: int | None) -> Any:
    """TensorBoard's tracker for the run ``name`` below ``folder``; what is later than step ``purge`` is forgotten."""
    tracker = tracking.TensorBoardTracker(name, folder, purge_step=purge)
    tracker.start()
    return tracker
