"""``server.max_versions`` and ``max_in_flight_total``: what is held at most, and that whoever waits gets through."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from flexp.config import ServerConfig
from flexp.errors import LinkError, LinkLostError, StoppedError
from flexp.links.emulated import EmulatedLink, Network
from flexp.links.grpc import connect, serve
from flexp.links.messages import Abort, BackwardReply, BackwardRequest, ForwardReply, ForwardRequest, Leave
from flexp.links.opening import connected
from flexp.links.rules import Limits
from flexp.server import Server
from tests.harness import SGD, World, seeded, world
from tests.links.grpc_tools import SOON, eventually
from tests.server.test_interleavings import CUTS, Reference, request


@pytest.fixture
def link_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are taken when they are known, as a link over a network takes them."""
    monkeypatch.setattr("flexp.server.exchanges.waiting_thread", lambda: None)


def joined(names: list[str], **config: Any) -> World:
    here = world("llama", config=ServerConfig(**config), optimizer=SGD)
    for number, name in enumerate(names):
        here.join(name, list(CUTS.values())[number % 3])
    return here


def work_off(server: Server) -> None:
    """What a link does between two requests."""
    while server.work() is not None:
        pass


def forward(server: Server, client: str, number: int = 1) -> Future[ForwardReply]:
    answer: Any = server.answer(client, request(number, padded=False)[0])
    work_off(server)
    if isinstance(answer, Future):
        return answer
    done: Future[ForwardReply] = Future()
    done.set_result(answer)
    return done


def backward(server: Server, client: str, number: int = 1) -> BackwardReply:
    reply = server.answer(client, BackwardRequest(number, request(number, padded=False)[1], step=number, exchanges=1))
    assert isinstance(reply, BackwardReply)  # a backward never waits
    work_off(server)
    return reply


@pytest.mark.usefixtures("link_thread")
@pytest.mark.parametrize(
    ("bound", "most", "peak"), [("max_versions", 3, 3), ("max_versions", 64, 5), ("max_in_flight_total", 3, 3)]
)
def test_many_clients_in_random_order(bound: str, most: int, peak: int) -> None:
    """Bounded; first come, first served; and each gradient belongs to the weights of its own forward, bit for bit."""
    names = [f"{letter}{number}" for number in range(4) for letter in CUTS]
    here, reference = joined(names, **{bound: most}), Reference(world("llama").whole, "full", SGD)
    server, draw = here.server, random.Random(0)
    left, asked = dict.fromkeys(names, 2), dict[str, Future[ForwardReply]]()
    line, seen, number = list[str](), set[str](), {name: 10 * place + 1 for place, name in enumerate(names)}

    def look() -> None:
        """Whose forwards are through now, in the order in which they came."""
        for name in [name for name in line if asked[name].done()]:
            assert line[0] == name
            line.pop(0)
            reference.forward(name[0], request(number[name], padded=False)[0])

    while any(left.values()):
        name = draw.choice([name for name in names if left[name] and name not in line])
        if name not in asked:
            asked[name] = forward(server, name, number[name])
            line.append(name)
        else:
            grad_BTH = request(number[name], padded=False)[1]
            back = BackwardRequest(number[name], grad_BTH, step=number[name], exchanges=1)
            reply: Any = server.answer(name, back)
            h_BTH, wanted, _ = reference.backward(name[0], back)
            work_off(server)
            assert torch.equal(reply.grad_BTH, wanted)
            assert torch.equal(asked.pop(name).result().hidden_BTH, h_BTH)
            left[name] -= 1
            number[name] += 1
            seen.add(name)
        look()
        assert server.counts()["versions" if bound == "max_versions" else "in_flight"] <= most
    assert seen == set(names)
    assert server.shared.peak_versions >= peak
    weights = server.shared.updater.parameters
    assert all(torch.equal(value, weights[name]) for name, value in reference.weights.items())


@pytest.mark.usefixtures("link_thread")
def test_who_holds_weights_goes_on_with_them() -> None:
    here = joined(["a", "b", "c"], max_versions=2)
    server = here.server
    before = forward(server, "a", 1).result().hidden_BTH
    assert forward(server, "b", 2).done()
    backward(server, "b", 2)
    waiting = forward(server, "c", 3)
    assert not waiting.done()
    again = forward(server, "a", 4 + 3)  # its second exchange must not wait for its first, nor hold other weights
    assert server.counts()["versions"] == 2
    again.result()
    assert torch.equal(before, joined(["a"]).server.answer("a", request(1, padded=False)[0]).hidden_BTH)
    backward(server, "a", 1)
    assert not waiting.done()
    backward(server, "a", 7)
    assert waiting.done()


@pytest.mark.usefixtures("link_thread")
def test_who_holds_something_goes_on_where_nobody_else_begins() -> None:
    """Or two that hold one forward each and ask for another would wait for each other."""
    here = joined(["a", "b", "c"], max_in_flight_total=2)
    server = here.server
    for number, name in enumerate("abab", 1):
        assert forward(server, name, number).done()
    waiting = forward(server, "c", 5)
    for number, name in enumerate("aba", 1):
        assert not waiting.done()
        backward(server, name, number)
    assert waiting.done()


@pytest.mark.usefixtures("link_thread")
def test_what_has_come_already_is_answered_before_its_client_is_given_up() -> None:
    here = joined(["a", "b"], max_in_flight_total=1)
    server, later = here.server, list[Any]()
    server.submit = later.append  # as the thread that computes has work waiting
    forward(server, "a", 1)
    server._sessions["a"].pending[1].since -= 100.0
    waiting = forward(server, "b", 2)
    assert len(later) == 1
    backward(server, "a", 1)  # it was on its way
    later.pop()()
    assert waiting.done()
    assert not server._sessions["a"].drops


@pytest.mark.usefixtures("link_thread")
def test_backwards_in_line_are_those_that_are_waited_for() -> None:
    here = world("llama", tuning="lora", config=ServerConfig(joined=True), optimizer=SGD)
    here.join("a", CUTS["a"])
    forward(here.server, "a", 1)
    grad = request(1, padded=False)[1]
    with pytest.raises(LinkError, match="exchange 2"):
        here.server.answer("a", BackwardRequest(2, grad, step=1))
    here.server.answer("a", BackwardRequest(1, grad, step=1, exchanges=1))
    with pytest.raises(LinkError, match="a backward of exchange 1 is in line already"):
        here.server.answer("a", BackwardRequest(1, grad, step=1, exchanges=1))
    work_off(here.server)
    assert here.server._sessions["a"].kept_bytes == 0


@pytest.mark.usefixtures("link_thread")
@pytest.mark.parametrize("how", ["leaves", "gives up", "stops"])
def test_nobody_waits_for_ever(how: str) -> None:
    here = joined(["a", "b", "c"], max_versions=2)
    server = here.server
    forward(server, "a", 1)
    forward(server, "b", 2)
    backward(server, "b", 2)
    one, two = forward(server, "b", 3), forward(server, "c", 4)
    assert not one.done()
    if how == "leaves":
        server.answer("a", Leave())
        work_off(server)
    elif how == "gives up":
        server.answer("b", Abort())
        work_off(server)
        with pytest.raises(LinkLostError, match="do the step again"):
            one.result(5)
        assert not two.done()
        backward(server, "a", 1)
    elif how == "stops":
        server.dismiss()
        with pytest.raises(StoppedError):
            two.result(5)
        return
    assert two.result(5).hidden_BTH.shape[2] == 32


@pytest.mark.usefixtures("link_thread")
def test_who_is_silent_is_given_up_and_who_is_slow_has_more_time_then() -> None:
    here = joined(["a", "b", "c"], max_versions=2, hold_seconds=0.2)
    server = here.server

    def held(by_a: int) -> Future[ForwardReply]:
        """Of c, which waits for what a holds."""
        forward(server, "a", by_a)
        forward(server, "b", by_a + 1)
        backward(server, "b", by_a + 1)
        waiting = forward(server, "c", by_a + 2)
        assert not waiting.done()
        return waiting

    held(1).result(5)
    with pytest.raises(LinkLostError, match=r"s, and it was given up \(server.exchange_seconds, or server.hold_"):
        server.answer("a", BackwardRequest(1, request(1, padded=False)[1], step=1))
    backward(server, "c", 3)
    session = server._sessions["a"]
    assert session.patience >= 2 * session.progress.slow >= 0.4
    session.progress.slow = 100.0  # as of a client with a slow line
    waiting = held(4)
    session.pending[4].since -= 150.0
    server._look_after_line()
    assert not waiting.done()
    session.pending[4].since -= 100.0
    server._look_after_line()
    assert waiting.done()


@pytest.mark.usefixtures("link_thread")
def test_what_waits_counts_as_kept_and_is_bounded() -> None:
    here = joined(["a", "b"], max_in_flight_total=1, max_kept_bytes=1 << 14)
    forward(here.server, "a", 1)
    larger = ForwardRequest(2, torch.randn(4, 32, 32), train=True)  # 16 KiB
    with pytest.raises(LinkLostError, match="client b: too much waits in line"):
        here.server.answer("b", larger)
    assert not forward(here.server, "b", 3).done()
    assert here.server._sessions["b"].kept_bytes == request(3, padded=False)[0].hidden_BTH.nbytes
    backward(here.server, "a", 1)
    backward(here.server, "b", 3)
    assert here.server._sessions["b"].kept_bytes == 0


def test_one_thread_with_many_clients_goes_through() -> None:
    """Whoever waits for its answer in the thread that must let the weights go would wait for itself."""
    here = joined(["a", "b", "c"], max_versions=2)
    server = here.server
    for name, number in (("a", 1), ("b", 2)):
        forward(server, name, number)
    backward(server, "b", 2)
    assert forward(server, "c", 3).done()


def test_so_do_clients_of_one_thread_behind_networks() -> None:
    """Each of them has a thread of its own in which its requests arrive; the one that waits is this."""
    here = world("llama", config=ServerConfig(max_versions=2), optimizer=SGD)
    names = ["a", "b", "c"]
    with ExitStack() as links:
        models = [
            here.client(
                name,
                CUTS[name],
                link=links.enter_context(connected(EmulatedLink(here.server.connect(name), Network()))),
            )
            for name in names
        ]
        first = models[0](**here.batch()).loss
        models[1](**here.batch()).loss.backward()
        models[2](**here.batch()).loss.backward()
        first.backward()
    assert here.server.shared.version == 3


def test_forwards_that_wait_leave_the_room_for_frames_to_gradients() -> None:
    here = world("llama", config=ServerConfig(max_versions=2), optimizer=SGD)
    sent = {
        name: [torch.randn(8, 100, 32, generator=seeded(10 * n + way)) for way in range(2)]
        for n, name in enumerate("abcd")
    }
    frame = sent["a"][0].nbytes
    with serve(here.server, limits=Limits(memory_bytes=2 * frame + 1000)) as serving, ExitStack() as ends:
        links = {name: connect(f"grpc://{serving.address}", name, codec="off") for name in sent}
        for name, link in links.items():
            ends.callback(link.close)
            here.client(name, (2, 4), link=link)
        asked = {}
        for name, (z_BTH, grad_BTH) in sent.items():
            asked[name] = links[name].call(ForwardRequest(1, z_BTH, step=1, train=True))
            if name in "ab":
                asked[name].result(SOON)
            if name == "b":
                links["b"].call(BackwardRequest(1, grad_BTH, step=1)).result(SOON)
        assert eventually(lambda: len(here.server._line.waiting) == 2 and not serving._memory.used)
        links["a"].call(BackwardRequest(1, sent["a"][1], step=1)).result(SOON)
        asked["c"].result(SOON)
        asked["d"].result(SOON)


@pytest.mark.parametrize("bound", ["max_versions", "max_in_flight_total"])
@pytest.mark.parametrize("grpc", [True, False])
def test_clients_in_threads(grpc: bool, bound: str) -> None:
    here = world("llama", config=ServerConfig(**{bound: 2}), optimizer=SGD)
    failed: list[BaseException] = []

    def work(number: int, address: str) -> None:
        try:
            link = connect(f"grpc://{address}", f"c{number}") if grpc else here.server.connect(f"c{number}")
            model = here.client(f"c{number}", list(CUTS.values())[number % 3], link=link)
            for step in range(4):
                model(**here.batch(seed=step)).loss.backward()
            link.close()
        except BaseException as error:
            failed.append(error)

    with serve(here.server) as serving:
        threads = [threading.Thread(target=work, args=(number, str(serving.address))) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not failed
    assert here.server.shared.version == 24
    assert here.server.shared.peak_versions <= 2
