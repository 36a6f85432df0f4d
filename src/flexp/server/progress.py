"""Which of a client's steps the shared blocks have taken, and what was answered to them.

A step that comes again, after its answer was lost or after the client went back to a snapshot, gets the answers that
it got the first time and is never applied twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexp.links.messages import size

WINDOW = 256
"""Steps may complete in another order than they began; so far back it is remembered which ones did."""

Key = tuple[str, int]
"""What was asked in a step: the kind of request, and its exchange or block."""


@dataclass
class Progress:
    """One client's steps. ``numbering`` is what tells its steps 1, 2, … from those of another run of that client.

    Attributes:
        newest: the highest step that was applied.
        kept_from: steps after this one keep their answers; ``None``: only the newest does.
    """

    numbering: int = 0
    newest: int = 0
    kept_from: int | None = None
    _recent: set[int] = field(default_factory=set)
    _answers: dict[int, dict[Key, Any]] = field(default_factory=dict)
    _bytes: int = 0

    def goes_on(self, numbering: int) -> bool:
        """Whether a client that joins with ``numbering`` goes on with these steps."""
        return 0 < numbering == self.numbering

    def applied(self, step: int) -> bool:
        """Whether the shared blocks have taken this step; never, if it is not numbered."""
        return step > 0 and (step in self._recent or step <= self.newest - WINDOW)

    def apply(self, step: int) -> None:
        """The step is complete and was given to the shared blocks."""
        if step <= 0:
            return
        self._recent.add(step)
        self.newest = max(self.newest, step)
        self._recent = {number for number in self._recent if number > self.newest - WINDOW}

    def answer(self, step: int, key: Key) -> Any | None:
        """What was answered to ``key`` in a step that was applied, if it is still known."""
        return self._answers.get(step, {}).get(key)

    def remember(self, step: int, key: Key, reply: Any, most_bytes: int) -> None:
        """Keep an answer of a numbered step; the oldest steps' go first when all take more than ``most_bytes``."""
        if step <= 0:
            return
        known = self._answers.setdefault(step, {})
        self._bytes += size(reply) - (size(known[key]) if key in known else 0)
        known[key] = reply
        self.forget(step - 1 if self.kept_from is None else self.kept_from)
        while self._bytes > most_bytes and len(self._answers) > 1:
            self._drop(min(self._answers))

    def forget(self, step: int) -> None:
        """Drop the answers of ``step`` and those before it."""
        for number in [number for number in self._answers if number <= step]:
            self._drop(number)

    def give_up(self, steps: set[int]) -> None:
        """Drop what was answered in steps that will not be completed as they began."""
        for number in steps & self._answers.keys():
            self._drop(number)

    def unapplied(self) -> set[int]:
        """Steps with answers that are not complete."""
        return {number for number in self._answers if not self.applied(number)}

    def state(self) -> Tensor:
        """Numbering and applied steps, int64; answers are not part of it."""
        return torch.tensor([self.numbering, self.newest, *sorted(self._recent)], dtype=torch.int64)

    @classmethod
    def restored(cls, state: Tensor) -> Progress:
        """From :meth:`state`."""
        numbering, newest, *recent = (int(value) for value in state)
        return cls(numbering, newest, _recent=set(recent))

    def _drop(self, step: int) -> None:
        self._bytes -= sum(size(reply) for reply in self._answers.pop(step).values())
