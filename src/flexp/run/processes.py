"""Processes of this machine that begin with everything imported: forked from one that did nothing else.

Importing torch and transformers takes seconds, and hundreds of megabytes that the processes then have in common. Where
forks are not safe (no Linux) each imports for itself.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

IMPORTED = ["datasets", "flexp.run.client", "flexp.run.runner", "flexp.run.server"]
CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def begin(work: Callable[..., None], *arguments: Any, log: Path, threads: int, alone: bool = False) -> BaseProcess:
    """Start a process that does ``work``, a function of a module, with so many threads.

    Args:
        log: to which what it prints is added.
        alone: in a session of its own, so that it gets no signals from the terminal. Else it ignores interruptions,
            which are its parent's.
    """
    log.touch()
    if CONTEXT.get_start_method() == "forkserver":
        CONTEXT.set_forkserver_preload(IMPORTED)
    process: BaseProcess = CONTEXT.Process(target=_begun, args=(work, arguments, log, threads, alone), daemon=False)
    with _inherited(threads):
        process.start()
    return process


def _begun(work: Callable[..., None], arguments: tuple[Any, ...], log: Path, threads: int, alone: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler if alone else signal.SIG_IGN)
    if alone:
        os.setsid()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    gc.freeze()  # to look through what was imported would copy its pages (130 MB), and take 0.4 s each time
    if "torch" in sys.modules:  # imported before the fork, perhaps for others
        sys.modules["torch"].set_num_threads(threads)
    work(*arguments)


@contextlib.contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What must be set before torch is imported; and interruptions ignored until the process does so itself."""
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
