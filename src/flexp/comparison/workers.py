"""Processes that do cells, one after the other: they live long, as loading torch takes longer than a small cell.

Each has its share of the cores, told before torch is loaded. One that dies takes only its cell with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from flexp.comparison.cells import Cell, execute
from flexp.errors import FlexpError


@dataclass
class Worker:
    """One process, what it is doing, and the way to talk to it."""

    process: SpawnProcess
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
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        log = self.out / f"worker-{number + 1}.log"
        process = context.Process(target=_work, args=(there, self.out, self.threads, log), daemon=False)
        with _inherited(self.threads):
            process.start()
        there.close()
        return Worker(process, here)


@contextlib.contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What a child must find set before it loads torch; and interruptions ignored: those are its parent's."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    wanted = dict.fromkeys(names, str(threads))
    wanted |= {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    os.environ.update(wanted)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: Connection, out: Path, threads: int, log: Path) -> None:
    """A worker's life."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        try:
            cell: Cell = pipe.recv()
        except EOFError:
            return
        pipe.send(_do(cell, out, threads))
        sys.stdout.flush()


def _end_with_the_parent() -> None:
    """Or a cell whose comparison was killed would go on for hours, unseen. What it has saved is gone on with."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(cell: Cell, out: Path, threads: int) -> str | None:
    try:
        execute(cell, out, threads)
    except FlexpError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error} (a mistake of FlexP's; see the worker's log)".replace("\n", " ")
    return None
