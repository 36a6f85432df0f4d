"""What happens in a run, told once: in ``metrics.jsonl``, in TensorBoard's events if there are any, and to a person.

A simulation keeps one diary of all its clients, a client of a deployment its own; the records are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flexp.client.trainer import Step
from flexp.report.metrics import MetricsLog, Record
from flexp.report.progress import Progress
from flexp.run.recutting import in_words

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
        self.note(in_words(record))

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        if self._events is not None:
            self._events.close()
