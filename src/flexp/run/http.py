"""A small HTTP server for a page or two, which nobody can fill with requests that never end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

MOST = 16
SECONDS = 5.0


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class PatientServer(ThreadingMixIn, WSGIServer):
    """Answers up to ``most`` requests at once, and ends one that takes longer than ``seconds``, however it does that.

    Beyond ``most`` a connection is closed at once.

    Raises:
        OSError: it cannot listen there.
    """

    daemon_threads = True

    def __init__(
        self, host: str, port: int, app: Callable[..., Any], most: int = MOST, seconds: float = SECONDS
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free, self._seconds = threading.BoundedSemaphore(most), seconds
        super().__init__((host, port), _Quiet)
        self.set_app(app)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        cut = threading.Timer(self._seconds, _cut, [request])  # a byte now and then would keep a time-out from passing
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who cuts a request short gets no traceback into the server's log."""


def _cut(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
