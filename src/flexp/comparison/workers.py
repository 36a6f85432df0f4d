"""Processes that do cells, one after the other, each with its share of the cores. One that dies takes only its cell
with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from flexp.comparison.cells import Cell, execute
from flexp.errors import FlexpError
from flexp.run.processes import CONTEXT, begin


@dataclass
class Worker:
    """One process, what it is doing, and the way to talk to it."""

    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None


class Pool:
    """``jobs`` worker processes. Leaving the block ends them, whatever they are doing.

    Args:
        out: the comparison's folder; what libraries print goes to ``worker-N.log`` there.
    """

    def __init__(self, jobs: int, out: Path) -> None:
        self.jobs, self.out = jobs, out
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.workers: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.pipe.close()  # an idle one leaves by itself
            if worker.cell is not None:
                worker.process.terminate()
        for worker in self.workers:
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    @property
    def free(self) -> int:
        """How many cells can be given out now."""
        return self.jobs - sum(worker.cell is not None for worker in self.workers)

    @property
    def busy(self) -> bool:
        """Whether a cell is being done."""
        return any(worker.cell is not None for worker in self.workers)

    def give(self, cell: Cell) -> None:
        """Have a free worker do ``cell``, a new one if there is none yet or it died while it was idle."""
        for worker in [worker for worker in self.workers if worker.cell is None]:
            try:
                worker.pipe.send(cell)
            except OSError:
                worker.pipe.close()
                worker.process.join()
                self.workers.remove(worker)
                continue
            worker.cell = cell
            return
        worker = self._start(len(self.workers))
        self.workers.append(worker)
        worker.cell = cell
        worker.pipe.send(cell)

    def take(self, timeout: float | None = None) -> Iterator[tuple[Cell, str | None]]:
        """Wait for cells to end; gives each with what went wrong with it, or None."""
        active = {worker.pipe: worker for worker in self.workers if worker.cell is not None}
        for pipe in wait(list(active), timeout):
            assert isinstance(pipe, Connection)
            worker = active[pipe]
            cell = worker.cell
            assert cell is not None
            try:
                problem: str | None = pipe.recv()
                worker.cell = None
            except (EOFError, OSError):
                worker.process.join()
                self.workers.remove(worker)
                code = worker.process.exitcode
                problem = f"its process ended with {code}" + ("; is there enough memory?" if code == -9 else "")
            yield cell, problem

    def _start(self, number: int) -> Worker:
        here, there = CONTEXT.Pipe()
        log = self.out / f"worker-{number + 1}.log"
        process = begin(_work, there, self.out, self.threads, log=log, threads=self.threads)
        there.close()
        return Worker(process, here)


def _work(pipe: Connection, out: Path, threads: int) -> None:
    """A worker's life."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    while True:
        try:
            cell: Cell = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(cell, out, threads))
        sys.stdout.flush()


def _end_with_the_parent() -> None:
    """Or a cell whose comparison was killed would go on for hours, unseen. What it has saved is gone on with."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def attempt(cell: Cell, out: Path, threads: int) -> str | None:
    """Do a cell in this process; gives what went wrong, or None."""
    try:
        execute(cell, out, threads)
    except FlexpError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error} (a mistake of FlexP's; see the worker's log)".replace("\n", " ")
    return None
