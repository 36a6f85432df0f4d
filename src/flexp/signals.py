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
def interrupted_by_term() -> Iterator[None]:
    """In the block, SIGTERM ends things as Ctrl-C does, so that whoever started others takes them along. Outside a
    process's main thread signals are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


@contextmanager
def stopped_by_signal(stop: threading.Event | None) -> Iterator[threading.Event]:
    """An event that a signal sets; whoever embeds the block gives ``stop`` instead, and signals are left alone."""
    if stop is not None:
        yield stop
        return
    stopped = threading.Event()
    with on_signal(stopped.set):
        yield stopped
