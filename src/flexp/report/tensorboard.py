"""The run's diary for trackers: as TensorBoard events, one TensorBoard run a client, and for what else was asked for
(:mod:`flexp.report.trackers`).

``events/federation`` has the means over the clients scored in a round, traffic and clock by **round**;
``events/NAME`` has a client's losses and scores by its **own steps** (a score after a round stands at the
client's last step of that round).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from flexp.config import RunConfig
from flexp.errors import StorageError
from flexp.files import folder_name, storage_error
from flexp.report.metrics import Record
from flexp.report.trackers import OneRun, event_files

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        means = {f"{tag}_mean": sum(clients.values()) / len(clients) for tag, clients in self._scores.items()}
        self._scores.clear()
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
