"""Who may join, how often somebody may try, and how fast a client may send."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexp.config import GuardConfig, ServerConfig
from flexp.errors import ConfigError, LinkError
from flexp.links.grpc import Tokens, connect, serve
from flexp.links.grpc.gate import Attempts, host_of
from flexp.links.grpc.status import ask_readmit, ask_status
from flexp.links.grpc.stream import Bucket, Rates
from flexp.links.grpc.tokens import issue
from flexp.links.messages import ForwardRequest
from flexp.links.rules import Limits
from tests.harness import world

from .grpc_tools import SOON, eventually


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waits_double_and_end() -> None:
    clock = Clock()
    attempts = Attempts(free=3, longest=60.0, clock=clock)
    waits = []
    for _ in range(10):
        attempts.failed("a", "192.0.2.1")
        waits.append(attempts.wait("a", "192.0.2.1"))
        clock.now += waits[-1]
        assert attempts.wait("a", "192.0.2.1") == 0
    assert waits == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    attempts.failed("a", "192.0.2.1")
    assert attempts.wait("b", "192.0.2.1") == 0  # others behind the address do not wait
    assert attempts.wait("a", "192.0.2.2") == 0  # nor does the name elsewhere, yet
    for number in range(30):
        attempts.failed("a", f"192.0.2.{number + 3}")
    assert attempts.wait("a", "192.0.2.2") == 60  # the name, from wherever
    assert attempts.wait("b", "192.0.2.2") == 0
    clock.now += 121
    attempts.failed("a", "192.0.2.1")
    assert attempts.wait("a", "192.0.2.1") == 0  # long ago is forgotten


def test_nobody_is_kept_out_by_what_others_try_in_its_name() -> None:
    attempts = Attempts(free=1, clock=Clock())
    attempts.succeeded("a", "192.0.2.9")
    for number in range(20):
        attempts.failed("a", f"192.0.2.{number + 20}")
    assert attempts.wait("a", "192.0.2.1") > 0
    assert attempts.wait("a", "192.0.2.9") == 0


def test_what_is_remembered_is_bounded() -> None:
    attempts = Attempts(most=50, clock=Clock())
    for number in range(5000):
        attempts.failed(f"name {number}", f"address {number}")
        attempts.succeeded(f"name {number}", f"good {number}")
    assert len(attempts) <= 150


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.1:4711", "192.0.2.1"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:192.0.2.1]:4711", "192.0.2.1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1", "fe80::/64"),
        ("unix:/tmp/x", "unix"),
        ("", ""),
    ],
)
def test_addresses_of_peers(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_who_keeps_failing_waits_even_with_the_right_token(tmp_path: Path) -> None:
    token = issue(tmp_path / "tokens", "a")
    here = world("llama")
    with serve(here.server, tokens=Tokens.read(tmp_path / "tokens")) as serving:
        url = f"grpc://{serving.address}"
        for number in range(10):
            with pytest.raises(LinkError, match="client and token do not go together"):
                connect(url, "a", token=f"{token}{number}")
        with pytest.raises(LinkError, match=r"too many attempts to join have failed; try again in 1 s"):
            connect(url, "a", token=token)
        serving._gate._attempts._failures.clear()  # instead of waiting
        connect(url, "a", token=token).close()


def test_the_allow_list(tmp_path: Path) -> None:
    tokens = {name: issue(tmp_path / "tokens", name) for name in "ab"}
    here = world("llama")
    with serve(here.server, allow=["a"]) as serving:
        connect(f"grpc://{serving.address}", "a").close()
        with pytest.raises(LinkError, match="client and token do not go together"):
            connect(f"grpc://{serving.address}", "b")
    with serve(here.server, allow=["a", "c"], tokens=Tokens.read(tmp_path / "tokens")) as serving:
        url = f"grpc://{serving.address}"
        connect(url, "a", token=tokens["a"]).close()
        for name, token in (("b", tokens["b"]), ("c", tokens["a"]), ("c", None)):
            with pytest.raises(LinkError, match="client and token do not go together"):
                connect(url, name, token=token)


def test_a_bucket_lets_its_rate_pass() -> None:
    clock = Clock()
    bucket = Bucket(10.0, 20.0, clock)
    assert [bucket.take(10) for _ in range(4)] == [0, 0, 1, 2]
    clock.now += 2.5
    assert bucket.take(5) == 0
    clock.now += 1000
    assert bucket.take(25) == pytest.approx(0.5)
    assert Bucket(math.inf, math.inf, clock).take(1e12) == 0


def test_rates_outlive_streams_and_are_bounded() -> None:
    clock = Clock()
    limits = replace(Limits(), requests_per_second=2.0, bytes_per_second=100.0, burst_seconds=1.0)
    rates = Rates(limits, most=10, clock=clock)
    assert [rates.take("a", 10) for _ in range(4)] == [0, 0, 0.5, 1.0]
    assert rates.take("b", 300) == 2.0
    for number in range(100):
        rates.take(f"client {number}", 1)
    assert len(rates._buckets) == 10


def test_who_sends_too_fast_is_read_more_slowly_and_answered_all_the_same() -> None:
    here = world("llama")
    limits = Limits(requests_per_second=20.0, burst_seconds=0.1)  # two at once
    with serve(here.server, limits=limits) as serving:
        link, other = (connect(f"grpc://{serving.address}", name, codec="off") for name in "ab")
        for each in (link, other):
            here.client(each.client, (2, 4), link=each)
        began = time.monotonic()
        answers = [link.call(ForwardRequest(number, torch.zeros(1, 2, 32))) for number in range(12)]
        quick = other.call(ForwardRequest(1, torch.zeros(1, 2, 32)))
        quick.result(SOON)
        assert not answers[-1].done()  # the other did not wait for it
        for answer in answers:
            answer.result(SOON)
        assert (
            time.monotonic() - began > 0.4
        )  # ten of them at twenty a second; never too early, however slow it is here
        link.close()
        other.close()


def bad_requests(here: Any, url: str, token: str | None = None) -> str:
    """Send what is not finite until the server has enough; the last thing it says."""
    link = connect(url, "a", token=token, codec="off")
    here.client("a", (2, 4), link=link)
    said = ""
    for number in range(3):
        said = str(link.call(ForwardRequest(number, torch.full((1, 2, 32), math.nan), train=True)).exception(SOON))
    assert eventually(lambda: link._broken is not None)
    assert "client a is quarantined" in str(link._broken)
    link.close()
    return said


def test_who_is_quarantined_is_thrown_out_until_the_operator_lets_it_in(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    token, operator = issue(path, "a"), issue(path, "operator")
    here, heard = world("llama", config=ServerConfig(guard=GuardConfig(strikes=3, aside_seconds=None))), []
    here.server.guard.say = heard.append
    with serve(here.server, tokens=Tokens.read(path), facts=lambda _: here.server.counts()) as serving:
        url = f"grpc://{serving.address}"
        assert "an activation of exchange 2 is not finite" in bad_requests(here, url, token)
        assert eventually(lambda: not serving.clients)
        assert ask_status(url, token=operator)["clients_aside"] == 1
        with pytest.raises(LinkError, match="client a is quarantined until the operator lets it in again"):
            connect(url, "a", token=token)
        for wrong in (None, token):
            with pytest.raises(LinkError, match="this needs the token of 'operator'"):
                ask_readmit(url, "a", token=wrong, insecure=False)
        with pytest.raises(LinkError, match="has not quarantined b"):
            ask_readmit(url, "b", token=operator, insecure=False)
        with pytest.raises(ConfigError, match="is no name"):
            ask_readmit(url, "", token=operator, insecure=False)
        ask_readmit(url, "a", token=operator, insecure=False)
        link = connect(url, "a", token=token)
        here.client("a", (2, 4), link=link)(**here.batch()).loss.backward()
        link.close()
    assert here.server.shared.version == 1
    assert len(heard) == 1
    assert not here.server.aside_listeners[1:]  # a server that stopped is not told
