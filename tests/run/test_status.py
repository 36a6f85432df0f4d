"""What a server says of itself, to the operator and to Prometheus."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request

import pytest
from typer.testing import CliRunner

from flexp.cli.main import app
from flexp.errors import LinkError
from flexp.links.grpc import connect, serve
from flexp.links.grpc.security import Tokens
from flexp.links.grpc.status import ask_status
from flexp.run.status import Observed, Teller
from tests.harness import world


def test_status_and_metrics() -> None:
    here = world("bert")
    teller = Teller(here.server)
    ready = [True]
    with serve(here.server, facts=teller.facts) as serving:
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
        as_json = CliRunner().invoke(app, ["status", str(serving.address), "--json"])
        assert json.loads(as_json.stdout)["clients"]["a"]["applied_steps"] == 1

        observed = Observed("127.0.0.1:0", lambda: teller.facts(serving), lambda: ready[0])
        text = _get(f"http://{observed.address}/metrics")
        assert "flexp_server_updates_total 1.0" in text
        assert 'flexp_client_applied_steps{client="a"} 1.0' in text
        assert _get(f"http://{observed.address}/healthz") == "ok\n"
        assert _get(f"http://{observed.address}/readyz") == "ready\n"
        ready[0] = False
        with pytest.raises(urllib.error.HTTPError, match="503"):
            _get(f"http://{observed.address}/readyz")
        observed.close()
        link.close()


def test_only_the_operator_may_ask_a_server_with_tokens() -> None:
    here = world("bert")
    tokens = Tokens({name: hashlib.sha256(name.encode() * 8).digest() for name in ("a", "operator")})
    with serve(here.server, facts=Teller(here.server).facts, tokens=tokens) as serving:
        url = f"grpc://{serving.address}"
        assert ask_status(url, token="operator" * 8)["updates"] == 0
        for token in (None, "a" * 8, "wrong"):
            with pytest.raises(LinkError, match="token of 'operator'"):
                ask_status(url, token=token)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())
