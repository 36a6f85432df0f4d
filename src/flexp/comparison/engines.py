"""Who does cells: processes on this machine, the workers of a Ray or dask cluster, or jobs of Slurm.

All have the same four verbs. Elsewhere, workers need FlexP, and the comparison's folder under the same path. A
worker that is lost takes no cell with it: its cells are given out again, and go on from their checkpoints.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from filelock import FileLock

from flexp._version import __version__
from flexp.comparison.cells import Cell, is_done
from flexp.comparison.config import Needs
from flexp.comparison.workers import attempt
from flexp.errors import ConfigError

REPEATS = 3
"""Times that a cell is given out again whose worker was lost."""
ALONE = threading.Lock()
"""Cells of one process go one after the other: torch's random numbers and threads are the process's."""


class Elsewhere:
    """Cells as jobs of somebody else's scheduler, with the verbs of :class:`flexp.comparison.workers.Pool`.

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
        """How many cells can be given out now."""
        return self.jobs - len(self._at_work)

    @property
    def busy(self) -> bool:
        """Whether a cell is being done."""
        return bool(self._at_work)

    def give(self, cell: Cell) -> None:
        """Have ``cell`` done."""
        self._at_work[self._submit(cell)] = cell

    def take(self) -> Iterator[tuple[Cell, str | None]]:
        """Wait for cells to end; gives each with what went wrong with it, or None."""
        for job in self._ended(list(self._at_work)):
            cell = self._at_work.pop(job)
            try:
                problem = self._result(job)
            except Exception as error:
                self._lost[cell.name] += 1
                if self._lost[cell.name] <= REPEATS:
                    self.give(cell)
                    continue
                problem = f"its worker was lost {REPEATS + 1} times ({_first(error)})"
            yield cell, problem


def engine_of(name: str, jobs: int, out: Path, needs: Needs) -> Elsewhere:
    """The engine that ``--engine`` names, if it is not ``local``, which is :class:`flexp.comparison.workers.Pool`.

    Raises:
        ConfigError: there is none of this name, its package is not installed, or it cannot be reached.
    """
    kind, _, address = name.partition(":")
    if kind not in ENGINES or (kind == "dask" and not address):
        raise ConfigError(f"--engine {name}: expected local, ray, ray:ADDRESS, dask:ADDRESS, slurm or slurm:local")
    try:
        return ENGINES[kind](address, jobs, out.resolve(), needs)
    except ImportError as error:
        raise ConfigError(f'--engine {name} needs {error.name}: pip install "flexp[{kind}]"') from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--engine {name}: cannot be reached ({_first(error)})") from error


def do(cell: Cell, out: str, threads: int, version: str) -> str | None:
    """A cell, in whatever process an engine has: with no more than its threads, whoever started that."""
    here = Path(out)
    if version != __version__:
        return f"the worker on {socket.gethostname()} has FlexP {__version__}, expected {version}: install the same"
    if not here.is_dir():
        return f"the worker on {socket.gethostname()} does not see {out}: choose an --out that all machines share"
    import torch

    lock = (here / cell.folder).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ALONE, FileLock(lock):  # who was given up for lost may still be at work
        if is_done(cell, here):
            return None
        torch.set_num_threads(threads)
        return attempt(cell, here, threads)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _ray(address: str, jobs: int, out: Path, needs: Needs) -> Elsewhere:
    import ray

    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = {**dict.fromkeys(names, str(needs.cpus)), "OMP_WAIT_POLICY": "passive"}
    here = {} if address else {"num_cpus": jobs * needs.cpus, "include_dashboard": False}
    ray.init(address=address or "local", runtime_env={"env_vars": env}, log_to_driver=False, **here)
    memory = {} if needs.memory_gb is None else {"memory": int(needs.memory_gb * 1e9)}
    there = ray.cluster_resources()
    if not address and (lacking := [key for key, n in {"GPU": needs.gpus, **memory}.items() if there.get(key, 0) < n]):
        ray.shutdown()
        raise ConfigError(f"compare.needs: this machine has too little {', '.join(lacking)} for one run")
    remote = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=0, **memory)(do)

    def close(left: list[Any]) -> None:
        for job in left:
            ray.cancel(job, force=True)
        ray.shutdown()

    return Elsewhere(
        jobs,
        lambda cell: remote.options(name=cell.name).remote(cell, str(out), needs.cpus, __version__),
        lambda jobs: ray.wait(jobs)[0],
        ray.get,
        close,
    )


def _dask(address: str, jobs: int, out: Path, needs: Needs) -> Elsewhere:
    from distributed import Client, wait

    client = Client(address)
    wanted = {"GPU": needs.gpus, "MEMORY": (needs.memory_gb or 0) * 1e9}
    resources = {name: amount for name, amount in wanted.items() if amount}

    def close(left: list[Any]) -> None:
        client.cancel(left, force=True)
        client.close()

    return Elsewhere(
        jobs,
        lambda cell: client.submit(do, cell, str(out), needs.cpus, __version__, pure=False, resources=resources),
        lambda jobs: list(wait(jobs, return_when="FIRST_COMPLETED").done),
        lambda job: job.result(),
        close,
    )


def _slurm(address: str, jobs: int, out: Path, needs: Needs) -> Elsewhere:
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
        lambda cell: executor.submit(do, cell, str(out), needs.cpus, __version__),
        ended,
        lambda job: job.result(),
        lambda left: [job.cancel() for job in left],
    )


ENGINES: dict[str, Callable[[str, int, Path, Needs], Elsewhere]] = {"ray": _ray, "dask": _dask, "slurm": _slurm}
