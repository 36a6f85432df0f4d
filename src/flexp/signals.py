"""Ctrl-C and SIGTERM as a wish that is granted at a good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signal(action: Callable[[], None]) -> Iterator[None]:
    """In the block, SIGINT and SIGTERM do ``action`` and nothing else. Only in a process's main thread."""
    earlier = {number: signal.signal(number, lambda *_: action()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def stopped_by_signal(stop: threading.Event | None) -> Iterator[threading.Event]:
    """An event that a signal sets; whoever embeds the block gives ``stop`` instead, and signals are left alone."""
    if stop is not None:
        yield stop
        return
    stopped = threading.Event()
    with on_signal(stopped.set):
        yield stopped
