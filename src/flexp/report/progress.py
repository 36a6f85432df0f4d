"""What a person sees while a run trains: a bar in a terminal, a line a round in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from flexp.errors import plain
from flexp.report import formats

DECAY = 0.9
"""Of what is shown of losses and alignment, here and in figures."""


class Progress:
    """Shows steps as they pass: overall bar, current client, smoothed loss and time left.

    Where the output is not a terminal, or ``CI`` is set, nothing moves: one line a round, and one a note.

    Args:
        total_steps: steps of all clients together, those done before a resumption included.
        title: what is running.
        metric: how scores are written (accuracies as percent).
        done: steps that were done before a resumption; they do not count for the time left.
        console: where to write; None: standard output.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        metric: str = "accuracy",
        done: int = 0,
        console: Console | None = None,
    ) -> None:
        self.total, self.title, self.metric, self.done = total_steps, title, metric, done
        self.console = console or Console()
        self._first = done
        self._loss: dict[str, Average] = {}
        self._align: dict[str, Average] = {}
        self._started = time.monotonic()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    @property
    def live(self) -> bool:
        """Whether a moving display is shown."""
        return moving(self.console)

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self.live:
            self._bar = bar(self.console)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, state="")
            self._bar.start()
        else:
            self._print(f"{self.title}: {self.total - self.done} steps to do")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        ended = "done" if kind is None else "stopped"
        self._print(f"{self.title}: {ended} after {formats.seconds(self.elapsed)}, {self._count()}")

    def step(self, client: str, loss: float, align: float | None = None) -> None:
        """One optimiser step of ``client`` has passed."""
        self.done += 1
        average = self._loss.setdefault(client, Average()).add(loss)
        state = f"{client}  loss {average:.3f}"
        if align is not None:
            state += f"  align {self._align.setdefault(client, Average()).add(align):.3g}"
        if self._bar is not None and self._task is not None:
            most = max(self.total, self.done)
            self._bar.update(self._task, completed=self.done, total=most, state=f"{state}  {self._left()}")

    def passed(self, rounds: int, of: int) -> None:
        """So many rounds of all are over: some methods take more steps in one than were planned, some fewer."""
        self.total = (2 * self.done * of + rounds) // (2 * rounds)

    def round(self, n: int, scores: Mapping[str, float | None]) -> None:
        """Round ``n`` has been evaluated; ``scores`` as :func:`flexp.report.summary.aggregate` gives them."""
        parts = [f"round {n}", self._count()]
        losses = [average.value for average in self._loss.values()]
        if losses:
            parts.append(f"loss {sum(losses) / len(losses):.3f}")
        for key, label in (("personal", "own test data"), ("global", "everybody's"), ("validation", "validation")):
            mean, worst = scores.get(f"{key}_mean"), scores.get(f"{key}_worst")
            if mean is not None:
                what = "" if formats.is_fraction(self.metric) else f"{formats.inside(self.metric)} "
                text = f"{label} {what}{formats.score(mean, self.metric)}"
                if worst is not None:
                    text += f" (worst {formats.score(worst, self.metric)})"
                parts.append(text)
        known = {f"{side}_{over}" for side in ("personal", "global", "validation") for over in ("mean", "worst")}
        parts += [
            f"{key} {formats.number(value)}" for key, value in scores.items() if key not in known and value is not None
        ]
        parts.append(formats.seconds(self.elapsed))
        if 0 < self.done < self.total:
            parts.append(self._left())
        self._print("  ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """A line of text, above the bar if there is one."""
        self._print(plain(text))

    @property
    def elapsed(self) -> float:
        """Seconds since the display was entered."""
        return time.monotonic() - self._started

    def _left(self) -> str:
        passed = self.done - self._first
        if passed <= 0:
            return ""
        return formats.left(self.elapsed / passed * (self.total - self.done))

    def _count(self) -> str:
        """Without a total where there is none, or it was passed."""
        if not self.done <= self.total > 0:
            return f"step {self.done}"
        return f"step {self.done}/{self.total} ({100 * self.done // self.total} %)"

    def _print(self, text: str) -> None:
        # soft_wrap: a log line stays one line whatever width the console assumes.
        self.console.print(Text(text), soft_wrap=not self.live)


class Average:
    """Bias-corrected exponential moving average."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with ``value``."""
        self._sum = DECAY * self._sum + (1 - DECAY) * value
        self._weight = DECAY * self._weight + (1 - DECAY)
        return self.value

    @property
    def value(self) -> float:
        """The average; NaN of nothing."""
        return self._sum / self._weight if self._weight else float("nan")


def bar(console: Console) -> RichProgress:
    """A bar whose tasks have a ``state``, a text beside it; text is shown literally."""
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        console=console,
        expand=True,
        transient=True,
    )


def moving(console: Console) -> bool:
    """Whether a display may move: in a terminal, unless ``CI`` is set."""
    ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return console.is_terminal and not console.is_dumb_terminal and not ci
