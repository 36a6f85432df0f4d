"""What a server says of itself: for ``flexp status``, for Prometheus and for whoever asks whether it is well; and a
small HTTP server for that, which nobody can fill with requests that never end.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexp._version import __version__
from flexp.errors import ConfigError
from flexp.links.grpc import Serving
from flexp.links.grpc.security import Address
from flexp.run.conduct import Conductor
from flexp.server import Server

Facts = dict[str, Any]

_OF_CLIENTS = {
    "steps": "Steps that the client has done.",
    "applied_steps": "Of its steps those that trained the shared blocks.",
    "loss": "Of its last step.",
    "score": "Of its personal model on its own test data, when it was last scored.",
    "bytes_up": "Bytes of tensors that it has sent in training.",
    "bytes_down": "Bytes of tensors that it has received in training.",
    "compute_seconds": "Seconds that it has computed.",
    "waited_seconds": "Seconds that it has waited for the server or the network.",
    "bad_requests": "Of its requests those that were refused for their values.",
    "skipped_steps": "Of its steps those that were answered and not applied.",
    "aside": "1 while it is put aside.",
    "connected": "1 while it is connected.",
}
_OF_SERVER = {
    "updates": "Updates of the shared blocks.",
    "compute_seconds": "Seconds that the server has computed.",
    "in_flight": "Forwards whose backward has not come yet.",
    "versions": "Versions of the shared weights that are held.",
    "bad_requests": "Requests refused for their values.",
    "clients_aside": "Clients that are put aside.",
    "skipped_steps": "Steps of clients that were answered and not applied.",
}
_COUNTERS = ("updates", "compute_seconds", "bad_requests", "skipped_steps")


class StatusReporter:
    """Gathers the facts.

    Args:
        conductor: if the server conducts a run; it knows what clients say of themselves.
    """

    def __init__(self, server: Server, conductor: Conductor | None = None) -> None:
        self._server, self._conductor = server, conductor
        self._began = time.time()

    def facts(self, serving: Serving) -> Facts:
        """The server's, and those of every client that is or was here, by name."""
        connected = set(serving.clients)
        members = {} if self._conductor is None else dict(self._conductor.members)
        names = sorted(connected | members.keys() | self._server.clients.keys() | self._server.guard.all_aside.keys())
        return {
            "version": __version__,
            "blocks": list(self._server.blocks),
            "tuning": self._server.tuning,
            "run": None if self._conductor is None else self._conductor.run,
            "snapshots": [] if self._conductor is None else self._conductor.numbers,
            "seconds": time.time() - self._began,
            **self._server.counts(),
            "servers": {} if self._server.chain is None else self._server.chain.told.facts,
            "clients": {name: self._client(name, name in connected, members) for name in names},
        }

    def _client(self, name: str, connected: bool, members: dict[str, Any]) -> Facts:
        regular = self._server.clients.get(name)
        member = members.get(name)
        # Who has just come, and is not back at its snapshot yet, says nothing of what it has done.
        back = member is not None and (
            member.ready.steps or member.ready.done is not None or not member.ready.snapshots
        )
        said = {**member.facts, "steps": member.ready.steps} if member is not None and back else {}
        return {
            **said,  # first: what a client says of itself never stands for what the server knows
            "connected": connected,
            "cut": self._server.cut_of(name),
            "bad_requests": self._server.guard.bad(name),
            "skipped_steps": self._server.skipped[name],
            "aside": self._server.aside(name) is not None,
            "applied_steps": 0 if regular is None else max(0, regular.progress.newest - self._server.skipped[name]),
        }


class _Metrics(Collector):
    def __init__(self, facts: Callable[[], Facts]) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        facts = self._facts()
        for name, text in _OF_SERVER.items():
            family = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
            yield family(f"flexp_server_{name}", text, value=float(facts[name]))
        for name, text in _OF_CLIENTS.items():
            metric = GaugeMetricFamily(f"flexp_client_{name}", text, labels=["client"])
            for client, own in facts["clients"].items():
                if own.get(name) is not None:
                    metric.add_metric([client], float(own[name]))
            yield metric


@contextmanager
def observed(listen: str, facts: Callable[[], Facts], ready: Callable[[], bool]) -> Iterator[Address]:
    """Inside the ``with`` block an HTTP server answers /metrics (Prometheus), /healthz (the process answers) and
    /readyz (clients are served); gives where. The same two are on the server's own port, as gRPC's health service.

    Raises:
        ConfigError: it cannot listen there.
    """
    registry, address = CollectorRegistry(), Address.of_text(listen)
    registry.register(_Metrics(facts))
    metrics = make_wsgi_app(registry)

    def answer(environ: Any, start: Any) -> Any:
        pages = {"/healthz": (True, "ok"), "/readyz": (ready(), "ready")}
        if environ["PATH_INFO"] not in pages:
            return metrics(environ, start)
        well, word = pages[environ["PATH_INFO"]]
        start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{word}\n".encode() if well else f"not {word}\n".encode()]

    try:
        server = PatientServer(address.host, address.port, answer)
    except OSError as error:
        raise ConfigError(f"--metrics {listen}: cannot listen there ({error.strerror})") from error
    threading.Thread(target=server.serve_forever, name="flexp-metrics", daemon=True).start()
    try:
        yield Address(address.host, server.server_port)
    finally:
        server.shutdown()
        server.server_close()


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
