"""Emulated networks: when bytes arrive, that calls overlap, that chance has a seed, and what a break leaves."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexp
from flexp.config import AlignConfig, CodecConfig, OptimizerConfig
from flexp.errors import ConfigError, LinkError
from flexp.links.base import Link, Meter
from flexp.links.emulated import EmulatedLink, Line, Network, split_url
from flexp.links.grpc import connect, serve
from flexp.links.messages import ForwardReply, ForwardRequest
from flexp.links.opening import as_link, connected
from flexp.models.zoo import save_tiny
from flexp.optim import Updater
from flexp.rng import RandomStream
from tests.harness import copied, equal, shared_weights, world

from .grpc_tools import SOON

SLOW = Network(latency_s=0.02, jitter_s=0.005, uplink_bps=2e6, downlink_bps=1e6)


def test_bytes_queue_and_latency_overlaps() -> None:
    """1,000 bytes at 1 Mbit/s are 8 ms; three messages sent at once leave one after the other, 50 ms on their way."""
    line = Line(Network(latency_s=0.05), 1e6, "up")
    got = [line.arrival(now, 1000) for now in (10.0, 10.0, 10.0, 11.0)]
    assert got == pytest.approx([10.058, 10.066, 10.074, 11.058])
    assert Line(Network(latency_s=0.05), None, "up").arrival(3.0, 10**12) == pytest.approx(3.05)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**6)), min_size=1, max_size=20), st.integers(0, 99))
def test_jitter_is_drawn_from_the_seed_within_its_bound_and_overtakes_nothing(
    sent: list[tuple[float, int]], seed: int
) -> None:
    network = Network(latency_s=0.01, jitter_s=0.3, seed=seed)
    one, again, plain = (Line(each, 1e7, "up") for each in (network, network, Network(latency_s=0.01)))
    now, before = 0.0, 0.0
    for pause, size in sent:
        now += pause
        arrival = one.arrival(now, size)
        assert arrival is not None
        assert arrival == again.arrival(now, size)
        least = plain.arrival(now, size)
        assert least is not None
        assert before <= arrival
        assert least <= arrival <= max(before, least + 0.3)
        before = arrival


def test_loss_is_drawn_from_the_seed() -> None:
    lost = [[Line(Network(loss=0.2, seed=seed), None, way).arrival(0, 1) is None for way in map(str, range(400))]
            for seed in (0, 0, 1)]  # fmt: skip
    assert lost[0] == lost[1] != lost[2]
    assert 50 < sum(lost[0]) < 110
    line = Line(Network(loss=1.0), None, "up")
    assert line.arrival(0.0, 1) is None


@pytest.mark.parametrize("codec", [None, CodecConfig.all("int8-row")], ids=["exact", "int8"])
def test_weights_and_meters_do_not_depend_on_the_network(codec: CodecConfig | None) -> None:
    results = []
    for kind in ("in-process", "emulated", "emulated-grpc"):
        here = world("llama", optimizer=OptimizerConfig(name="sgd", lr=1e-2))
        with serve(here.server) as serving:
            link: Link = here.server.connect("a")
            if kind == "emulated-grpc":
                link = connect(f"grpc://{serving.address}", "a", codec="off")
            with connected(link if kind == "in-process" else EmulatedLink(link, SLOW)) as link:
                model = here.client("a", (3, 4), AlignConfig(kind="kl"), link=link, codec=codec)
                updater = Updater(model.stage.trainable(), OptimizerConfig(name="sgd", lr=1e-2))
                for seed in range(2):
                    model(**here.batch(seed, padding="left")).loss.backward()
                    updater.step()
                traffic = link.meter.training
                sizes = (traffic.bytes_up, traffic.bytes_down, traffic.exchanges)
                results.append((copied(model.stage.trainable()) | shared_weights(here.server), sizes))
                if kind != "in-process":
                    least = 4 * 2 * SLOW.latency_s + 8 * (sizes[0] / 2e6 + sizes[1] / 1e6)
                    assert traffic.waited_seconds >= 0.9 * least
    assert all(equal(results[0][0], other[0]) and results[0][1] == other[1] for other in results[1:])


class _Slow:
    """A server whose answers come when the test says so."""

    client, meter, residuals = "a", Meter(), {}

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answers: list[Future[Any]] = []
        self.closed = 0

    def call(self, request: ForwardRequest) -> Future[Any]:
        self.asked.append(request.exchange)
        self.answers.append(Future())
        return self.answers[-1]

    def close(self) -> None:
        self.closed += 1


def test_requests_overlap_and_arrive_in_order() -> None:
    """Ten requests are at the server before the first is answered: none waits for another."""
    inner: Any = _Slow()
    link = EmulatedLink(inner, Network(latency_s=0.02, jitter_s=0.01))
    z = torch.zeros(1, 2, 4)
    futures = [link.call(ForwardRequest(number, z)) for number in range(10)]
    end = time.monotonic() + SOON
    while len(inner.answers) < 10 and time.monotonic() < end:
        time.sleep(0.005)
    assert inner.asked == list(range(10))
    assert not any(future.done() for future in futures)
    for answer in inner.answers:
        answer.set_result(ForwardReply(z))
    assert all(torch.equal(future.result(SOON).hidden_BTH, z) for future in futures)
    link.close()
    assert inner.closed == 1


def test_a_lost_connection_fails_what_is_under_way_and_the_server_forgets_it() -> None:
    here = world("llama")
    before = shared_weights(here.server)
    with connected(EmulatedLink(here.server.connect("a"), Network(latency_s=0.01))) as link:
        model = here.client("a", (2, 4), link=link)
        loss = model(**here.batch()).loss
        link.lose()
        with pytest.raises(LinkError, match="client a: the emulated network lost the connection"):
            loss.backward()
        with pytest.raises(LinkError, match="lost the connection"):
            model(**here.batch())
        model._join((2, 4))  # a client that comes again begins anew
        assert not here.server._sessions["a"].pending
        assert equal(shared_weights(here.server), before)
        model(**here.batch()).loss.backward()
        assert here.server.shared.version == 1


def test_connections_break_by_chance() -> None:
    here = world("llama")
    link = EmulatedLink(here.server.connect("a"), Network(loss=1.0))
    with pytest.raises(LinkError, match="lost the connection"):
        here.client("a", (2, 4), link=link)
    link.close()


def test_refusals_travel() -> None:
    here = world("llama")
    with connected(EmulatedLink(here.server.connect("a"), SLOW)) as link:
        with pytest.raises(LinkError, match="client a was refused: its cut"):
            here.client("a", (0, 4), link=link, expose_embeddings=True)
        here.client("a", (2, 4), link=link)
        with pytest.raises(LinkError, match=r"is \(1, 2, 31\)"):
            link.call(ForwardRequest(1, torch.zeros(1, 2, 31))).result(SOON)
    with pytest.raises(LinkError, match="the link is closed"):
        link.call(ForwardRequest(1, torch.zeros(1, 2, 32))).result(SOON)


def test_waiting_lets_the_server_draw() -> None:
    """The server computes in another thread, and needs its turn at the generator while the client waits."""
    here = world("bert", dropout=0.2)
    with connected(EmulatedLink(here.server.connect("a"), Network(latency_s=0.001))) as link:
        with RandomStream(0).active():
            model = here.client("a", (2, 4), link=link)
            model(**here.batch()).loss.backward()
            model.abort()
        assert here.server.shared.version == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "flexp-emulated-server"]


def test_urls(tmp_path: Any) -> None:
    url = "grpc://a@h:1?latency=25ms&jitter=0.001s&up=20mbit&down=1.5gbit&loss=0.01&seed=7"
    assert split_url(url) == ("grpc://a@h:1", Network(0.025, 0.001, 20e6, 1.5e9, 0.01, 7))
    assert split_url("grpc://a@h:1") == ("grpc://a@h:1", None)
    for query, words in (
        ("lag=1", r"has no 'lag'; expected latency, jitter"),
        ("latency=1h", r"latency = '1h', expected a number with s or ms, as in latency=25ms"),
        ("up=0mbit", r"up = '0mbit', expected a number with bit or kbit"),
        ("up=-1mbit", "up = '-1mbit', expected"),
        ("loss=2", "loss = '2', expected a probability"),
        ("seed=1.5", "seed = '1.5', expected a whole number"),
        ("latency=", "latency = '', expected"),
    ):
        with pytest.raises(ConfigError, match=words):
            as_link(f"grpc://a@h:1?{query}")
    folder = save_tiny("llama", tmp_path)
    server = flexp.Server.from_pretrained(folder, base_depth=1)
    with flexp.serve(server) as serving:
        address = f"grpc://a@{serving.address}?latency=1ms"
        model = flexp.SplitModelForCausalLM.from_pretrained(folder, cut=(2, 4), link=address)
        assert isinstance(model.link, EmulatedLink)
        assert model.link.network == Network(latency_s=0.001)
        model.link.close()
