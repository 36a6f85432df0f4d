"""What a person sees while methods are compared: a bar in a terminal, a line a cell in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from flexp.comparison.cells import Cell
from flexp.comparison.compare import Watcher
from flexp.comparison.config import Entry
from flexp.comparison.grid import Settings
from flexp.report import formats
from flexp.report.progress import bar, moving


class Display(Watcher):
    """Counts cells and says how long the others will take, by the guessed cost of each."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title, self.console = title, console or Console()
        self.total = self.done = 0
        self._cost = self._passed = 0.0
        self._began = time.monotonic()
        self._started: dict[str, float] = {}
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def plan(self, cells: int, cost: float, kept: int) -> None:
        self.total, self._cost = cells, cost
        self._say(f"{self.title}: {cells} runs to do, {kept} done before")
        self._began = time.monotonic()
        if cells and moving(self.console):
            self._bar = bar(self.console)
            self._task = self._bar.add_task(self.title, total=cells, state="")
            self._bar.start()

    def began(self, cell: Cell) -> None:
        self._started[cell.name] = time.monotonic()
        self._update()

    def ended(self, cell: Cell, problem: str | None) -> None:
        self.done += 1
        self._passed += cell.cost
        took = time.monotonic() - self._started.pop(cell.name, time.monotonic())
        parts = [f"{self.done}/{self.total}", cell.name, formats.seconds(took), self._left()]
        if problem is not None:
            parts.insert(2, f"FAILED: {problem}")
        self._say("  ".join(part for part in parts if part))
        self._update()

    def chose(self, entry: Entry, settings: Settings) -> None:
        self._say(f"{entry.name}: tuned to " + ", ".join(f"{key} = {value}" for key, value in settings.items()))

    def _left(self) -> str:
        if self._passed <= 0:
            return ""
        return formats.left((time.monotonic() - self._began) / self._passed * (self._cost - self._passed))

    def _update(self) -> None:
        if self._bar is not None and self._task is not None:
            state = "; ".join([*self._started, self._left()]).strip("; ")
            self._bar.update(self._task, completed=self.done, state=state)

    def _say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
