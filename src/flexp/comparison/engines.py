"""Who does cells: processes on this machine, or jobs of Slurm.

Everybody has the same four verbs. Elsewhere, workers need FlexP, and the comparison's folder under the same path. A
worker that is lost takes no cell with it: its cells are given out again, and go on from their checkpoints.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from flexp.comparison.cells import Cell
from flexp.comparison.config import Needs
from flexp.comparison.workers import attempt
from flexp.errors import ConfigError

REPEATS = 3
"""Times that a cell is given out again whose worker was lost."""


class Engine(Protocol):
    """Does cells, several at a time. Leaving the block ends what is being done."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

    @property
    def free(self) -> int:
        """How many cells can be given out now."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a cell is being done."""
        ...

    def give(self, cell: Cell) -> None:
        """Have ``cell`` done."""
        ...

    def take(self) -> Iterator[tuple[Cell, str | None]]:
        """Wait for cells to end; gives each with what went wrong with it, or None."""
        ...


class Elsewhere:
    """Cells as jobs of somebody else's scheduler.

    Args:
        submit: starts a cell; gives something that stands for it.
        ended: of such things those that have ended, after waiting for the first of them.
        result: what a cell came to (:func:`flexp.comparison.workers.attempt`); raises where its worker was lost.
        close: gives up what still runs, and the scheduler.
    """

    def __init__(
        self,
        jobs: int,
        submit: Callable[[Cell], Any],
        ended: Callable[[list[Any]], list[Any]],
        result: Callable[[Any], str | None],
        close: Callable[[list[Any]], object],
    ) -> None:
        self.jobs, self._submit, self._ended, self._result, self._close = jobs, submit, ended, result, close
        self._at_work: dict[Any, Cell] = {}
        self._lost: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(list(self._at_work))

    @property
    def free(self) -> int:
        return self.jobs - len(self._at_work)

    @property
    def busy(self) -> bool:
        return bool(self._at_work)

    def give(self, cell: Cell) -> None:
        self._at_work[self._submit(cell)] = cell

    def take(self) -> Iterator[tuple[Cell, str | None]]:
        for job in self._ended(list(self._at_work)):
            cell = self._at_work.pop(job)
            try:
                problem = self._result(job)
            except Exception as error:
                self._lost[cell.name] += 1
                if self._lost[cell.name] <= REPEATS:
                    self.give(cell)
                    continue
                problem = f"its worker was lost {REPEATS + 1} times ({type(error).__name__})"
            yield cell, problem


def engine_of(name: str, jobs: int, out: Path, needs: Needs) -> Engine:
    """The engine that ``--engine`` names, if it is not ``local``, which is :class:`flexp.comparison.workers.Pool`.

    Raises:
        ConfigError: there is none of this name, its package is not installed, or it cannot be reached.
    """
    kind, _, address = name.partition(":")
    if kind not in ENGINES:
        raise ConfigError(f"--engine {name}: expected local or slurm (slurm:local: its executor on this machine)")
    try:
        return ENGINES[kind](address, jobs, out.resolve(), needs)
    except ImportError as error:
        raise ConfigError(f'--engine {name} needs {error.name}: pip install "flexp[{kind}]"') from error
    except (OSError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--engine {name}: cannot be reached ({first})") from error


def do(cell: Cell, out: str, threads: int) -> str | None:
    """A cell, in whatever process an engine has: with no more than its threads, whoever started that."""
    import torch

    torch.set_num_threads(threads)
    return attempt(cell, Path(out), threads)


def _slurm(address: str, jobs: int, out: Path, needs: Needs) -> Engine:
    import submitit

    executor = submitit.AutoExecutor(folder=out / "slurm", cluster=address or "slurm")
    memory = {} if needs.memory_gb is None else {"mem_gb": needs.memory_gb}
    executor.update_parameters(
        name="flexp", cpus_per_task=needs.cpus, gpus_per_node=needs.gpus, timeout_min=needs.minutes, **memory
    )

    def ended(jobs: list[Any]) -> list[Any]:
        while not (found := [job for job in jobs if job.done()]):
            time.sleep(1.0)
        return found

    return Elsewhere(
        jobs,
        lambda cell: executor.submit(do, cell, str(out), needs.cpus),
        ended,
        lambda job: job.result(),
        lambda left: [job.cancel() for job in left],
    )


ENGINES: dict[str, Callable[[str, int, Path, Needs], Engine]] = {"slurm": _slurm}
