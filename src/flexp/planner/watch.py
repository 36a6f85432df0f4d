"""What one device had better choose now: predictions corrected by what is measured, with hysteresis.

Every client decides for itself, between two of its steps, and waits for nobody. Two rules:

- *Memory is short*: the choice that it has would not fit any more. Then it sheds at once: first a smaller micro-batch
  with the same cut, else the best cut that fits.
- *Something else is better*: another choice's objective is less by ``gain``, in ``patience`` looks in a row, at least
  ``pause`` steps after the last move, and with as many steps left to profit from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flexp.config.run import RecutConfig
from flexp.cost.choice import Choice, Prediction
from flexp.planner.fleet import MARGIN, Weights
from flexp.planner.options import Option
from flexp.planner.problem import Group, Problem, scales

HOLD = 0.05
"""Of memory: a choice is given up when it would leave less than this; a new one must leave :data:`MARGIN`."""
TOO_SHORT = 1e-4
"""Seconds; what takes less is not compared with its prediction."""


@dataclass(frozen=True)
class Situation:
    """What a device has now: bytes for training, and its seconds ÷ those predicted, of computing here, on the server,
    and on the link."""

    memory_bytes: int
    client: float = 1.0
    server: float = 1.0
    link: float = 1.0

    def correct(self, found: Prediction) -> Prediction:
        """The prediction, for the situation."""
        client, server, link = (
            found.client_seconds * self.client,
            found.server_seconds * self.server,
            found.link_seconds * self.link,
        )
        return replace(
            found, client_seconds=client, server_seconds=server, link_seconds=link, step_seconds=client + server + link
        )


@dataclass(frozen=True)
class Decision:
    """To choose something else: ``why``, and by what share of the objective it is better (0 if memory is short)."""

    choice: Choice
    why: Literal["memory", "gain"]
    gain: float = 0.0
    fits: bool = True


class Watch:
    """Looks at one device.

    Args:
        options: all that could be chosen, with what was predicted for the device.
        current: what it has, one of the options' choices.
    """

    def __init__(
        self, options: Sequence[Option], current: Choice, rules: RecutConfig, weights: Weights | None = None
    ) -> None:
        self.options, self.current, self.rules = list(options), current, rules
        self.weights = weights or Weights()
        self._moved_at: int | None = None
        self._better = 0

    def look(self, now: Situation, step: int, left: int) -> Decision | None:
        """What to do in a situation, ``left`` steps before the end; ``None``: nothing."""
        options = [replace(option, prediction=now.correct(option.prediction)) for option in self.options]
        mine = next(option for option in options if option.choice == self.current)
        fitting = [option for option in options if _leaves(option, now, MARGIN)]
        if not _leaves(mine, now, HOLD):
            return self._shed(mine, fitting, options)
        value, best = self._best([*fitting, *([] if mine in fitting else [mine])], mine)
        gain = 1.0 - value[best] / value[mine.choice] if value[mine.choice] else 0.0
        self._better = self._better + 1 if best != self.current and gain >= self.rules.gain else 0
        early = self._moved_at is not None and step - self._moved_at < self.rules.pause
        if self._better < self.rules.patience or early or left < self.rules.pause:
            return None
        return Decision(best, "gain", gain)

    def short(self, memory_bytes: int) -> bool:
        """Whether what the device has would not fit into so much any more."""
        return not any(option.choice == self.current and _leaves(option, Situation(memory_bytes), HOLD)
                       for option in self.options)  # fmt: skip

    def less(self) -> Decision | None:
        """What to do when memory has run out, whatever was measured; ``None``: there is nothing smaller."""
        mine = next(option for option in self.options if option.choice == self.current)
        found = self.look(Situation(int(mine.prediction.memory_bytes / (1.0 + HOLD))), 0, 0)
        return found if found is not None and found.choice != self.current else None

    def moved(self, choice: Choice, step: int) -> None:
        """The client has it now."""
        self.current, self._moved_at, self._better = choice, step, 0

    def refused(self, choice: Choice) -> None:
        """The server does not take this cut: look no more at it."""
        self.options = [option for option in self.options if option.choice.cut != choice.cut]
        self._better = 0

    def _shed(self, mine: Option, fitting: list[Option], options: list[Option]) -> Decision | None:
        same = [option for option in fitting if option.choice.cut == mine.choice.cut]
        if same or fitting:
            _, best = self._best(same or fitting, mine)
            return Decision(best, "memory")
        least = min(options, key=lambda option: option.prediction.memory_bytes)
        return None if least.choice == mine.choice else Decision(least.choice, "memory", fits=False)

    def _best(self, options: list[Option], mine: Option) -> tuple[dict[Choice, float], Choice]:
        """The objective of every option, and the best one's choice."""
        group = Group(("this device",), tuple(options))
        problem = Problem(
            (group,), 2**62, (0,) * (max(o.choice.cut[1] for o in options) + 1), self.weights, scales([group])
        )
        values = {option.choice: problem.measure([{index: 1}]).objective for index, option in enumerate(options)}
        return values, min(values, key=lambda choice: (values[choice], choice != mine.choice))


def _leaves(option: Option, now: Situation, share: float) -> bool:
    return option.prediction.memory_bytes * (1.0 + share) <= now.memory_bytes
