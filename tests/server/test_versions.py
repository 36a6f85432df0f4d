"""``server.max_versions``: how many versions of the weights are held, and that whoever waits for one gets through."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from flexp.config import ServerConfig
from flexp.errors import LinkLostError, StoppedError
from flexp.links.grpc import connect, serve
from flexp.links.messages import Abort, BackwardReply, BackwardRequest, ForwardReply, Leave
from flexp.server import Server
from tests.harness import SGD, World, world
from tests.server.test_interleavings import CUTS, Reference, request


@pytest.fixture
def link_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are taken when they are known, as a link over a network takes them."""
    monkeypatch.setattr("flexp.server.turns.waiting_thread", lambda: None)


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
@pytest.mark.parametrize(("most", "peak"), [(3, 3), (64, 5)])
def test_many_clients_in_random_order(most: int, peak: int) -> None:
    """Bounded; first come, first served; and each gradient belongs to the weights of its own forward, bit for bit."""
    names = [f"{letter}{number}" for number in range(4) for letter in CUTS]
    here, reference = joined(names, max_versions=most), Reference(world("llama").whole, "full", SGD)
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
        assert server.counts()["versions"] <= most
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
@pytest.mark.parametrize("how", ["leaves", "gives up", "is silent", "stops"])
def test_nobody_waits_for_ever(how: str) -> None:
    here = joined(["a", "b", "c"], max_versions=2, exchange_seconds=0.3 if how == "is silent" else 60.0)
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


def test_one_thread_with_many_clients_goes_through() -> None:
    """Whoever waits for its answer in the thread that must let the weights go would wait for itself."""
    here = joined(["a", "b", "c"], max_versions=2)
    server = here.server
    for name, number in (("a", 1), ("b", 2)):
        forward(server, name, number)
    backward(server, "b", 2)
    assert forward(server, "c", 3).done()


@pytest.mark.parametrize("grpc", [True, False])
def test_clients_in_threads(grpc: bool) -> None:
    here = world("llama", config=ServerConfig(max_versions=2), optimizer=SGD)
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
