"""What a server says of itself: for ``flexp status``, for Prometheus and for whoever asks whether it is well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
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
    "applied_steps": "The newest of its steps that the shared blocks have taken.",
    "loss": "Of its last step.",
    "score": "Of its personal model on its own test data, when it was last scored.",
    "bytes_up": "Bytes of tensors that it has sent in training.",
    "bytes_down": "Bytes of tensors that it has received in training.",
    "compute_seconds": "Seconds that it has computed.",
    "waited_seconds": "Seconds that it has waited for the server or the network.",
    "bad_requests": "Of its requests those that were refused for their values.",
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
}
_COUNTERS = ("updates", "compute_seconds", "bad_requests")


class Teller:
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
            "clients": {name: self._client(name, name in connected, members) for name in names},
        }

    def _client(self, name: str, connected: bool, members: dict[str, Any]) -> Facts:
        regular = self._server.clients.get(name)
        member = members.get(name)
        said = {} if member is None else {**member.ready.facts, "steps": member.ready.steps}
        return {
            "connected": connected,
            "cut": self._server.cut_of(name),
            "bad_requests": self._server.guard.bad(name),
            "aside": self._server.aside(name) is not None,
            "applied_steps": 0 if regular is None else regular.progress.newest,
            **said,
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


class Observed:
    """An HTTP server with /metrics (Prometheus), /healthz (the process answers) and /readyz (clients are served).

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(self, listen: str, facts: Callable[[], Facts], ready: Callable[[], bool]) -> None:
        registry = CollectorRegistry()
        registry.register(_Metrics(facts))
        address = Address.of_text(listen)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pages: dict[str, Callable[[], tuple[int, bytes]]] = {
                    "/metrics": lambda: (200, generate_latest(registry)),
                    "/healthz": lambda: (200, b"ok\n"),
                    "/readyz": lambda: (200, b"ready\n") if ready() else (503, b"not ready\n"),
                }
                page = pages.get(self.path.partition("?")[0], lambda: (404, b"/metrics, /healthz or /readyz\n"))
                code, body = page()
                self.send_response(code)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer((address.host, address.port), Handler)
        except OSError as error:
            raise ConfigError(f"--metrics {listen}: cannot listen there ({error.strerror})") from error
        self.address = Address(address.host, self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="flexp-metrics", daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
