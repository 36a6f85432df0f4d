"""What happens in a run, told once: in ``metrics.jsonl``, in TensorBoard's events if there are any, and to a person.

A simulation keeps one diary of all its clients, a client of a deployment its own; the records are the same. From its
scores follows whether the run ends early (``train.early_stopping``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flexp.client.trainer import Step
from flexp.config import TrainConfig
from flexp.config.train import EarlyStopping
from flexp.errors import ConfigError
from flexp.report.metrics import MetricsLog, Record
from flexp.report.progress import Progress

if TYPE_CHECKING:
    from flexp.report.tensorboard import EventWriter  # which takes memory that a client may not have


class Diary:
    """Writes and shows.

    Args:
        progress: where a person looks, entered by the caller.
    """

    def __init__(self, log: MetricsLog, progress: Progress, events: EventWriter | None = None) -> None:
        self._log, self._progress, self._events = log, progress, events
        self.note = progress.note

    def write(self, record: Mapping[str, Any]) -> None:
        """A record as it is."""
        self._log.write(record)
        if self._events is not None:
            self._events.write(record)

    def step(self, number: int, step: Step) -> None:
        """An optimiser step of a client in round ``number``."""
        facts = asdict(step)
        facts["step"], facts["tokens"] = facts.pop("number"), facts.pop("items")
        self.write({"kind": "step", "round": number, **facts})
        self._progress.step(step.client, step.loss, step.align)

    def scores(self, number: int, client: str, sides: Mapping[str, Mapping[str, float]]) -> None:
        """Of a client's personal model after round ``number``: ``personal``, and what else it was scored on."""
        self.write({"kind": "eval", "round": number, "client": client, **sides})

    def change(self, record: Record) -> None:
        """A cut that moved, or did not; a client that its device cannot hold, or can again."""
        self.write(record)
        from flexp.run.recutting import in_words  # brings the planner

        self.note(in_words(record))

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        if self._events is not None:
            self._events.close()


def ended(scores: Mapping[int, float | None], stopping: EarlyStopping, higher_is_better: bool) -> bool:
    """Whether the last ``patience`` scored rounds brought nothing better, by more than ``min_delta``, than one before.

    Args:
        scores: on validation data, by round; ``None``: not a number, which is no better.
    """
    if stopping.patience is None:
        return False
    best: float | None = None
    since, sign = 0, 1.0 if higher_is_better else -1.0
    for number in sorted(scores):
        value, since = scores[number], since + 1
        if value is not None and (best is None or sign * (value - best) > stopping.min_delta):
            best, since = value, 0
    return since >= stopping.patience


def may_be_last(number: int, train: TrainConfig) -> bool:
    """Whether a round's scores are kept with all tables: the one before training, the last, and any that may be it."""
    return number in (0, train.rounds) or train.early_stopping.patience is not None


def check_conducted(train: TrainConfig, schedule: str) -> None:
    """Refuse what a conductor cannot follow.

    Raises:
        ConfigError: a deterministic run would have to know everybody's scores before anybody goes on.
    """
    if train.early_stopping.patience is not None and schedule != "free":
        raise ConfigError(
            "train.early_stopping: in a deterministic run over a network nobody stops before the others; set "
            'deployment.schedule = "free", where every client stops for itself, or leave it out'
        )
