"""The address of a run's server, from before the server is there until it has gone; for runs whose address nobody has
again."""

from __future__ import annotations

import math
import socket
import struct
import threading
import time
from contextlib import suppress

from flexp.errors import LinkLostError, StoppedError

GONE = 3.0
"""Seconds that a client finds its server's address closed, until it leaves: the next run has another address."""


class Held:
    """An address that a server will have, taken before it is there: who comes is turned away until then. So whoever
    finds it closed knows that the server has gone. ``given``: the server has it."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_server((host, port))
        self.port = str(self._socket.getsockname()[1])
        self.address, self.given = f"{host}:{self.port}", False
        self._socket.settimeout(0.2)  # not every system tells who waits in accept that it is closed
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._turn_away, daemon=True)
        self._thread.start()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def give(self) -> None:
        """Leave it to the server, which opens it anew.

        Raises:
            StoppedError: it was let go of.
        """
        with self._lock:
            if self._closed:
                raise StoppedError("the run was stopped before its server was there")
            self.given = True
        self.let_go()

    def let_go(self) -> None:
        """Close it."""
        with self._lock:
            self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # who waits in accept is told
        self._thread.join()
        self._socket.close()

    def _turn_away(self) -> None:
        while not self._closed:
            with suppress(OSError):  # nobody came meanwhile, or somebody went at once
                came, _ = self._socket.accept()
                # Reset: what is closed in order keeps the address for a minute.
                came.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                came.close()


class Door:
    """A client's look at whether its server is there, before it connects."""

    def __init__(self, host: str, port: int) -> None:
        self._place, self._closed = (host, port), math.inf

    def look(self) -> None:
        """Wait no longer for a server that has gone.

        Raises:
            LinkLostError: it is not there yet, or perhaps gone.
            StoppedError: it has been gone for :data:`GONE` seconds.
        """
        try:
            with socket.create_connection(self._place, 5) as tried:
                self._closed = math.inf
                tried.settimeout(0.3)
                try:
                    tried.recv(1)
                except TimeoutError:
                    return  # a server waits to be spoken to
        except ConnectionRefusedError as error:
            self._closed = min(self._closed, time.monotonic())
            if time.monotonic() - self._closed >= GONE:
                raise StoppedError("the server has gone, and the run with it") from error
        except OSError:
            pass
        raise LinkLostError("the server is not there yet")

    def gone(self) -> bool:
        """Whether that is so."""
        try:
            self.look()
        except LinkLostError as error:
            return isinstance(error, StoppedError)
        return False
