"""What a server says of itself, to the operator and to Prometheus."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.errors import ConfigError, LinkError
from flexp.links.grpc import connect, serve
from flexp.links.grpc.security import Tokens
from flexp.links.grpc.status import ask_status
from flexp.links.messages import Ready
from flexp.run.conduct import Member
from flexp.run.status import PatientServer, StatusReporter, observed
from tests.harness import world
from tests.links.grpc_tools import eventually


def test_status_and_metrics() -> None:
    here = world("bert")
    reporter = StatusReporter(here.server)
    ready = [True]
    with serve(here.server, facts=reporter.facts) as serving:
        link = connect(f"grpc://{serving.address}", "a")
        model = here.client("a", (2, 4), link=link)
        model(**here.batch()).loss.backward()
        facts = ask_status(f"grpc://{serving.address}")
        assert (facts["blocks"], facts["updates"], facts["in_flight"]) == ([1, 4], 1, 0)
        known = {"connected": True, "cut": [2, 4], "applied_steps": 1}
        assert facts["clients"].keys() == {"a"}
        assert {key: facts["clients"]["a"][key] for key in known} == known
        shown = CliRunner().invoke(app, ["status", str(serving.address)])
        assert shown.exit_code == 0
        assert "1 updates" in shown.stdout
        assert "(2, 4)" in shown.stdout or "[2, 4]" in shown.stdout
        assert "skipped" not in shown.stdout
        here.server.shared.skipped["a"] = 1
        assert "skipped" in CliRunner().invoke(app, ["status", str(serving.address)]).stdout
        here.server.shared.skipped.clear()
        as_json = CliRunner().invoke(app, ["status", str(serving.address), "--json"])
        assert json.loads(as_json.stdout)["clients"]["a"]["applied_steps"] == 1

        with observed("127.0.0.1:0", lambda: reporter.facts(serving), lambda: ready[0]) as address:
            text = _get(f"http://{address}/metrics")
            assert "flexp_server_updates_total 1.0" in text
            assert 'flexp_client_applied_steps{client="a"} 1.0' in text
            assert _get(f"http://{address}/healthz") == "ok\n"
            assert _get(f"http://{address}/readyz") == "ready\n"
            ready[0] = False
            with pytest.raises(urllib.error.HTTPError, match="503"):
                _get(f"http://{address}/readyz")
            with pytest.raises(ConfigError, match="cannot listen there"):
                observed(str(address), dict, bool).__enter__()
        link.close()


def test_grpcs_own_health_service_says_whether_clients_are_served() -> None:
    """Anybody may ask, tokens or not: it says nothing of clients."""
    tokens = Tokens({"a": hashlib.sha256(b"a").digest()})
    with serve(world("bert").server, tokens=tokens) as serving, grpc.insecure_channel(str(serving.address)) as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service="flexp.Link")
        assert ask(request).status == health_pb2.HealthCheckResponse.SERVING
        serving.refuse_more()
        assert eventually(lambda: ask(request).status == health_pb2.HealthCheckResponse.NOT_SERVING)


def test_only_the_operator_may_ask_a_server_with_tokens() -> None:
    here = world("bert")
    tokens = Tokens({name: hashlib.sha256(name.encode() * 8).digest() for name in ("a", "operator")})
    with serve(here.server, facts=StatusReporter(here.server).facts, tokens=tokens) as serving:
        url = f"grpc://{serving.address}"
        assert ask_status(url, token="operator" * 8)["updates"] == 0
        for token in (None, "a" * 8, "wrong"):
            with pytest.raises(LinkError, match="token of 'operator'"):
                ask_status(url, token=token)


def test_what_a_client_says_of_itself_never_stands_for_what_the_server_knows() -> None:
    facts = {
        "connected": 1.0,
        "cut": 9.0,
        "applied_steps": 1e9,
        "aside": 0.0,
        "bad_requests": 0.0,
        "loss": 0.5,
        "x": 1.0,
    }
    conductor = SimpleNamespace(
        members={"a": Member(Ready(7, facts=facts | {"score": float("nan")}))}, run="run", numbers=[]
    )
    here = world("bert")
    serving: Any = SimpleNamespace(clients=[])
    told = StatusReporter(here.server, cast(Any, conductor)).facts(serving)["clients"]["a"]
    expected = {
        "connected": False,
        "cut": None,
        "bad_requests": 0,
        "aside": False,
        "applied_steps": 0,
        "skipped_steps": 0,
    }
    assert told == expected | {"loss": 0.5, "steps": 7}


def test_who_is_not_back_at_its_snapshot_has_no_zeros() -> None:
    """A client that was started again has some steps; nobody knows how many before it has gone back to them."""
    zeros = {"bytes_up": 0.0, "bytes_down": 0.0}
    words = {
        "back": Ready(0, done=None, run="run", snapshots=(1, 2), facts=zeros),
        "new": Ready(0, done=None, facts=zeros),
        "at work": Ready(3, done=4, run="run", snapshots=(1, 2), facts={"bytes_up": 9.0}),
    }
    conductor = SimpleNamespace(members={name: Member(word) for name, word in words.items()}, run="run", numbers=[])
    serving: Any = SimpleNamespace(clients=[])
    told = StatusReporter(world("bert").server, cast(Any, conductor)).facts(serving)["clients"]
    assert not {"steps", "bytes_up", "bytes_down"} & told["back"].keys()
    assert (told["new"]["steps"], told["new"]["bytes_up"]) == (0, 0.0)
    assert (told["at work"]["steps"], told["at work"]["bytes_up"]) == (3, 9.0)


def test_requests_that_never_end_are_ended() -> None:
    def answer(environ: Any, start: Any) -> Any:
        start("200 OK", [("Content-Type", "text/plain")])
        return [b"well"]

    server = PatientServer("127.0.0.1", 0, answer, most=4, seconds=0.3)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        before, place = threading.active_count(), ("127.0.0.1", server.server_port)
        halves = [socket.create_connection(place) for _ in range(16)]
        for half in halves:
            half.sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
        for half in halves:
            half.settimeout(20)
            with suppress(ConnectionResetError):
                assert half.recv(1) == b""
            assert threading.active_count() <= before + 2 * 4
        assert eventually(lambda: server._free._value == 4)
        assert _get(f"http://127.0.0.1:{server.server_port}/metrics") == "well"
        for half in halves:
            half.close()
    finally:
        server.shutdown()
        server.server_close()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
