"""A server as a process of its own: goes on from a file, tells what happens, stops cleanly and saves."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flexp.errors import LinkError, StorageError
from flexp.files import replacing
from flexp.links.grpc import Serving, serve
from flexp.server import Server

Say = Callable[[str], None]


def run_server(
    server: Server,
    listen: str,
    *,
    state: Path | None = None,
    say: Say,
    every: float = 30.0,
    grace: float = 10.0,
    stop: threading.Event | None = None,
    **options: Any,
) -> None:
    """Serve until SIGINT or SIGTERM; then let steps end, save, and leave.

    Args:
        state: the file to go on from, if it is there, and to save in.
        say: told one line at a time, from several threads.
        every: seconds between two lines of progress.
        grace: seconds that unfinished steps get; what is unfinished then is dropped, without effect on the weights.
        stop: stops the server as a signal does; with it, signals are left alone.
        options: of :class:`flexp.links.grpc.Serving`.

    Raises:
        ConfigError: it may not, or cannot, listen there.
        StorageError: the state is damaged, belongs to other blocks, or cannot be written.
    """
    if state is not None and state.exists():
        load(server, state)
        say(f"going on from {state}: {server.shared.version} updates of the shared blocks so far")
    with _signals(stop) as stopped, serve(server, listen, say=say, **options) as serving:
        say(f"serving blocks [{server.blocks[0]}, {server.blocks[1]}) at {serving.address}")
        told = None
        while not stopped.wait(every):
            now = (server.shared.version, serving.clients)
            if now != told:
                told = now
                names = ", ".join(serving.clients) or "none"
                say(f"{now[0]} updates, {server.compute_seconds:.0f} s of computing; clients: {names}")
        say("stopping")
        saved = _save_between_steps(server, serving, state, grace)
    if state is not None and not saved:
        save(server, state)  # everybody has left, so no step is unfinished any more
    where = f"saved in {state}" if state is not None else "nothing was saved, as no --state FILE was given"
    say(f"stopped after {server.shared.version} updates; {where}")


def save(server: Server, path: Path) -> None:
    """Write :meth:`Server.state` beside ``path``, then rename it.

    Raises:
        StorageError: it cannot be written; what stood at ``path`` is untouched.
        LinkError: steps are unfinished.
    """
    tensors = {name: value.detach().contiguous() for name, value in server.state().items()}
    with replacing(path) as part:
        try:
            save_file(tensors, part)
        except SafetensorError as error:
            raise StorageError(f"{path}: the state cannot be written ({error})") from error


def load(server: Server, path: Path) -> None:
    """Go on from what :func:`save` wrote.

    Raises:
        StorageError: the file is damaged, or of another server.
    """
    try:
        server.load(load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise StorageError(f"{path}: no state of a server can be read from it ({error})") from error


def _save_between_steps(server: Server, serving: Serving, state: Path | None, grace: float) -> bool:
    """Save when no client is in the middle of a step, and take no request after; gives whether that came in time."""

    def action() -> None:
        if state is not None:
            save(server, state)
        serving.refuse_more()

    end = time.monotonic() + grace
    while True:
        try:
            serving.at_rest(action)
            return True
        except LinkError:
            if time.monotonic() > end:
                serving.refuse_more()
                return False
            time.sleep(0.02)


@contextmanager
def _signals(stop: threading.Event | None) -> Iterator[threading.Event]:
    if stop is not None:
        yield stop
        return
    stopped = threading.Event()
    earlier = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
