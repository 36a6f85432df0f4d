"""One, two and three servers train the same bits."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.joined import OFF
from flexp.client.model import SplitModel
from flexp.config import AlignConfig, GuardConfig, OptimizerConfig, ServerConfig
from flexp.errors import BadValuesError, ConfigError, LinkError, LinkLostError
from flexp.links.asking import FetchRequest, PullRequest
from flexp.links.base import Link
from flexp.links.grpc import Tokens, connect, serve
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Join, Leave
from flexp.links.passing import Lead, Settle
from flexp.links.wrapping import Wrapping
from flexp.optim import Updater
from flexp.rng import RandomStream
from flexp.server import Server
from flexp.server.chain import PREVIOUS, Chain, Following, check_can_chain
from flexp.server.kept import Gathered
from tests.harness import World, copied, seeded, world

ADAM = OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.1, schedule="linear", warmup_steps=1, clip=0.05)
SGD = OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, clip=0.1)
BORDERS = {1: (1, 4), 2: (1, 2, 4), 3: (1, 2, 3, 4)}


def chained(name: str = "bert", count: int = 2, **options: Any) -> tuple[World, list[Server]]:
    """So many servers, the last one first made; and the world of the first."""
    places = BORDERS[count]
    worlds = [world(name, base_depth=s, end=e, **options) for s, e in itertools.pairwise(places)]
    drawn = world(name, **options).server.shared.updater.parameters
    for one in worlds:
        one.server.shared.load_weights({key: drawn[key] for key in one.server.shared.updater.parameters})
    for here, after in zip(worlds[-2::-1], worlds[:0:-1], strict=True):
        after.server.following = Following({})
        lead(here, after.server.connect)
    return worlds[0], [one.server for one in worlds]


def lead(here: World, reach: Any) -> None:
    border = here.server.blocks[1]
    here.server.chain = Chain(reach, Join(**here.card(PREVIOUS, (border, 4))), {}, "")


def weights(servers: list[Server]) -> dict[str, Tensor]:
    """Of all servers: weights, optimisers, what rules have gathered."""
    found: dict[str, Tensor] = {}
    for server in servers:
        found |= copied(server.shared.state())
    return found


class Federation:
    """Clients in turns, each with dropout, a tail and an optimiser of its own."""

    def __init__(
        self, name: str, count: int, cuts: Mapping[str, tuple[int, int]], align: AlignConfig = OFF, **options: Any
    ) -> None:
        self.here, self.servers = chained(name, count, total_steps=16, seed=5, dropout=0.2, **options)
        self.clients: dict[str, tuple[SplitModel, Updater, RandomStream]] = {}
        for seed, (client, cut) in enumerate(cuts.items()):
            model = self.here.client(client, cut, align)
            self.clients[client] = (model, Updater(model.stage.trainable(), ADAM, 8), RandomStream(seed))
        self.losses: list[float] = []

    def steps(self, count: int, pieces: int = 1) -> None:
        for step in range(count):
            for client, (model, updater, random) in self.clients.items():
                for piece in range(1, pieces + 1):
                    batch = self.here.batch(seed=7 * step + piece + len(client), padding="right")
                    with random.active(), model.part_of_step(Piece(piece, pieces, 1 / pieces, 1 / pieces)):
                        loss = model(**batch).loss
                        loss.backward()
                    self.losses.append(loss.item())
                updater.step()
                model.after_step()
        self.servers[0].flush()

    def everything(self) -> dict[str, Tensor]:
        flat = weights(self.servers)
        for client, (model, updater, _) in self.clients.items():
            flat |= {f"{client}/{key}": value for key, value in copied(model.personal_state()).items()}
            flat |= {f"{client}-optimizer/{key}": value for key, value in copied(updater.state()).items()}
        return flat


TEACH = AlignConfig(kind="kl", weight=0.3, at="every-block", teach=True)
PULL = AlignConfig(kind="weights", pull=0.3, every=2, teach=True)
FOLLOW = AlignConfig(kind="weights", pull=1.0, teach=True, follow=True)
PROJECT = AlignConfig(kind="mse", weight=0.3, combine="project")
CUTS = {"a": (1, 4), "bb": (2, 4), "ccc": (1, 2), "dddd": (3, 4), "e": (1, 3)}


@pytest.mark.parametrize(
    ("name", "align", "tuning", "pieces", "config", "optimizer"),
    [
        ("bert", TEACH, "full", 1, ServerConfig(), ADAM),
        ("bert", FOLLOW, "lora", 2, ServerConfig(guard=GuardConfig(clip=0.05)), SGD),
        ("gpt2", PULL, "full", 2, ServerConfig(update="mean", mean_over=3, memory="recompute"), ADAM),
        ("llama", PROJECT, "lora", 1, ServerConfig(update="trimmed", mean_over=3, guard=GuardConfig(clip=0.02)), SGD),
    ],
)
def test_one_two_and_three_servers_end_with_the_same_bits(
    name: str, align: AlignConfig, tuning: str, pieces: int, config: ServerConfig, optimizer: OptimizerConfig
) -> None:
    """Clipping bites: their thresholds are far below the norms."""
    ends, losses = [], []
    for count in (1, 2, 3) if align is TEACH else (1, 3):
        made = Federation(name, count, CUTS, align, tuning=tuning, config=config, optimizer=optimizer)
        made.steps(2, pieces)
        ends.append(made.everything())
        losses.append(made.losses)
    for end, told in zip(ends[1:], losses[1:], strict=True):
        assert told == losses[0]
        assert end.keys() == ends[0].keys()
        assert [name for name, value in end.items() if not torch.equal(value, ends[0][name])] == []


def test_a_client_that_sends_no_gradients_is_answered_along_the_chain() -> None:
    """And changes nothing there: it is the same whether one server or three answer it beside others that train."""
    ends, losses = [], []
    for count in (1, 3):
        made = Federation("bert", count, CUTS)
        model = made.clients["a"][0]
        for name, value in model.stage.trainable().items():
            value.requires_grad_(not model.stage.within(name, 0, model.cut[0]))
        model.gradients = False
        made.steps(2, 2)
        ends.append(made.everything())
        losses.append(made.losses)
        assert made.servers[0].clients["a"].progress.newest == 2
    assert losses[0] == losses[1]
    assert [name for name, value in ends[1].items() if not torch.equal(value, ends[0][name])] == []


def request(step: int) -> ForwardRequest:
    hidden = torch.randn(2, 5, 32, generator=seeded(step))
    return ForwardRequest(step << 16 | 1, hidden, train=True, step=step)


def gradient(step: int, scale: float = 1e-2) -> BackwardRequest:
    grad = scale * torch.randn(2, 5, 32, generator=seeded(100 + step))
    return BackwardRequest(step << 16 | 1, grad, step)


@pytest.mark.parametrize(("scale", "why"), [(float("nan"), "is not finite"), (1e-2, "the server takes at most")])
def test_what_the_whole_may_not_take_reaches_no_server(scale: float, why: str) -> None:
    """The bound is just below the norm of the whole, which no server's own part reaches."""
    one, _ = chained("llama", 1)
    one.join("a", (1, 4))
    one.server.answer("a", request(1))
    one.server.answer("a", gradient(1))
    (norm,) = one.server.bounds._norms
    here, servers = chained("llama", 3, config=ServerConfig(guard=GuardConfig(max_norm=0.999 * norm)))
    before = weights(servers)
    here.join("a", (1, 4))
    here.server.answer("a", request(1))
    with pytest.raises(BadValuesError, match=why):
        here.server.answer("a", gradient(1, scale))
    assert all(torch.equal(value, before[name]) for name, value in weights(servers).items())
    assert here.server.guard.bad("a") == 1
    for server in servers[1:]:
        assert server.guard.bad() == 0
        assert server.following is not None
        assert not server.following.complete
    here.server.answer("a", request(2))  # and it goes on
    here.server.answer("a", gradient(2, 5e-3))
    assert [server.shared.version for server in servers] == [2, 2, 2]  # loading counted as one


def test_a_step_has_no_more_on_its_way_than_it_says() -> None:
    """A second gradient for it would take the place of the judged one further on."""
    here, _ = chained("llama", 2)
    here.join("a", (1, 4))
    here.server.answer("a", request(1))
    here.server._sessions["a"].passing[1] = 1
    with pytest.raises(LinkLostError, match="step 1 has its 1 exchanges already on their way"):
        here.server.answer("a", gradient(1))


class Slow(Wrapping):
    """Requests arrive when :meth:`move` says so, and so do their answers, each in its order."""

    def __init__(self, inner: Link) -> None:
        super().__init__(inner)
        self.up, self.down = deque[tuple[Any, Future[Any]]](), deque[tuple[Future[Any], Future[Any]]]()

    def call(self, request: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        self.up.append((request, answer))
        while isinstance(request, Join) and not answer.done():
            self.move()
        return answer

    @property
    def waits(self) -> bool:
        return bool(self.up or (self.down and self.down[0][0].done()))

    def move(self) -> None:
        if self.down and self.down[0][0].done():
            told, answer = self.down.popleft()
            if told.exception() is None:
                answer.set_result(told.result())
            else:
                answer.set_exception(told.exception())
        else:
            request, answer = self.up.popleft()
            self.down.append((self.inner.call(request), answer))

    def close(self) -> None:
        while self.waits:
            self.move()
        super().close()


def slowly(count: int) -> tuple[World, list[Server], list[Slow], list[Slow]]:
    """Servers, their control links, and the links of clients as they are made."""
    here, servers = chained("llama", count)
    controls, links = [], list[Slow]()
    for server in servers[:-1]:
        chain = server.chain
        assert chain is not None
        chain.control = Slow(chain.control)
        controls.append(chain.control)

        def reach(name: str, make: Any = chain._reach) -> Link:
            links.append(Slow(make(name)))
            return links[-1]

        chain._reach = reach
    return here, servers, controls, links


def move(links: list[Slow], most: int = 1000) -> None:
    for _ in range(most):
        waiting = [link for link in links if link.waits]
        if not waiting:
            return
        waiting[0].move()


@pytest.mark.parametrize("given_up", [Abort(), Leave()])
def test_nothing_stays_anywhere_of_a_step_that_was_given_up_however_far_it_was(given_up: Any) -> None:
    for far in range(0, 10, 2 if isinstance(given_up, Leave) else 1):
        here, servers, controls, links = slowly(3)
        here.join("a", (1, 4), numbering=7)
        link = here.server.connect("a")
        link.call(request(1))
        move([*links, *controls])
        link.call(gradient(1))
        move(links, far)
        link.call(given_up)
        for chain in (servers[0].chain, servers[1].chain):
            if isinstance(given_up, Leave) and chain is not None:
                chain._leaving["a"].result()  # whoever joins again waits for that, too
        move([*links, *controls])
        assert [server.shared.version for server in servers] in ([1, 1, 1], [2, 2, 2])
        for server in servers:
            assert server.counts()["in_flight"] == 0
            assert server.following is None or server.following.complete == {}
            assert "a" not in server._sessions or isinstance(given_up, Abort)
        here.join("a", (1, 4), numbering=7)
        link.call(request(2))
        move([*links, *controls])
        answer = link.call(gradient(2))
        move([*links, *controls])
        assert answer.result().grad_BTH.shape == (2, 5, 32)


def test_what_is_on_its_way_further_on_holds_up_nobody_else() -> None:
    here, servers, controls, links = slowly(2)
    for name, cut in (("a", (1, 4)), ("b", (1, 4)), ("c", (1, 2))):
        here.join(name, cut)
    first, second = (here.server.answer(name, request(1)) for name in "ab")
    assert isinstance(first, Future)
    assert isinstance(second, Future)
    assert [len(link.up) for link in links] == [1, 1]  # of both the first server has done its part
    assert here.server.answer("c", request(1)).hidden_BTH.shape == (2, 5, 32)
    here.server.answer("c", gradient(1))  # is answered when the next server has heard of it, and nothing waits here
    assert [server.shared.version for server in servers] == [2, 1]
    move([links[1]])
    assert (first.done(), second.done()) == (False, True)
    move([*links, *controls])
    assert first.done()
    assert [server.shared.version for server in servers] == [2, 2]


def test_a_step_that_is_done_again_waits_until_all_have_heard_that_it_was_refused() -> None:
    here, servers, controls, links = slowly(3)
    here.join("a", (1, 4), numbering=7)
    link = here.server.connect("a")
    for what in (request(1), gradient(1, float("nan")), request(1)):
        link.call(what)
        move(links)
    again = link.call(gradient(1))
    move(links)  # and what the first server says to all is on its way
    move([*controls, *links])
    assert again.result().grad_BTH.shape == (2, 5, 32)
    assert [server.shared.version for server in servers] == [2, 2, 2]
    assert not any(server.following.complete for server in servers if server.following)


def test_servers_further_on_forget_a_client_whose_cut_ends_before_them() -> None:
    here, servers = chained("llama", 3)
    here.join("a", (1, 4))
    here.join("a", (1, 3))
    assert servers[1].chain is not None
    servers[1].chain._leaving["a"].result()
    assert [list(server._sessions) for server in servers] == [["a"], [PREVIOUS, "a"], [PREVIOUS]]
    here.join("a", (1, 4))
    assert "a" in servers[2]._sessions


def test_a_step_that_was_given_up_is_kept_for_a_while_and_never_applied_where_a_cut_no_longer_reaches() -> None:
    kept = Following({}, complete={("a", 1): Gathered(gradients={"w": torch.ones(1)})})
    assert kept.settled(Settle("a", 1, take=True, reaches=False)).gradients == {}
    assert kept.complete == {}


def test_a_step_that_comes_again_is_applied_once_by_every_server() -> None:
    here, servers = chained("bert", 3, dropout=0.2, remembers=True)
    here.join("a", (1, 4), numbering=7)
    first = [here.server.answer("a", what) for what in (request(1), gradient(1))]
    after = weights(servers)
    here.join("a", (2, 4), numbering=7)  # its answers are forgotten: it is computed again
    here.join("a", (1, 4), numbering=7)
    again = [here.server.answer("a", what) for what in (request(1), gradient(1))]
    assert again[1].grad_BTH.shape == first[1].grad_BTH.shape
    assert all(torch.equal(value, after[name]) for name, value in weights(servers).items())
    here.join("a", (1, 4), numbering=7)
    here.server.answer("a", request(2))
    here.join("a", (1, 4), numbering=7)  # a step that is lost in its middle, and done again
    here.server.answer("a", request(2))
    here.server.answer("a", gradient(2))
    assert [server.shared.version for server in servers] == [3, 3, 3]


def test_answers_are_written_and_weights_fetched_along_the_chain() -> None:
    texts, parts = [], []
    for count in (1, 3):
        here, servers = chained("llama", count)
        here.server.allow_export = True
        model = here.client("a", (1, 4)).eval()
        torch.manual_seed(0)
        texts.append(model.generate(here.batch()["input_ids"][:2, :5], max_new_tokens=6, do_sample=False))
        parts.append(here.server.answer("a", FetchRequest(3)))
        assert parts[-1].version == servers[0].shared.version
    assert torch.equal(*texts)
    assert parts[0].weights.keys() == parts[1].weights.keys() != set()
    assert all(torch.equal(value, parts[1].weights[name]) for name, value in parts[0].weights.items())


def test_weights_further_on_are_gathered_once_a_version_however_often_a_client_pulls() -> None:
    here, _ = chained("llama", 2)
    chain = here.server.chain
    assert chain is not None
    asked, call = list[Any](), chain.control.call
    chain.control.call = lambda request: asked.append(request) or call(request)  # type: ignore[method-assign, func-returns-value]
    here.join("a", (3, 4), align=AlignConfig(kind="weights", pull=0.5))
    for step in range(3):
        for _ in range(3):
            first = here.server.answer("a", PullRequest(2, 3, first=10**6))  # of which nothing crosses
        assert first.weights == {}
        here.server.answer("a", request(step + 1))
        here.server.answer("a", gradient(step + 1))
    assert sum(isinstance(one, FetchRequest) for one in asked) == 3


class Kept:
    """Snapshots of the run x."""

    run, numbers = "x", (1,)

    def keep(self, number: int, run: str, held: Any) -> None: ...

    def back(self, number: int) -> None: ...


def test_what_several_servers_cannot_do_is_refused() -> None:
    here, (_, last) = chained("llama", 2)
    for config in (ServerConfig(adapters="own"), ServerConfig(guard=GuardConfig(similar=0.0))):
        with pytest.raises(ConfigError, match="is not supported with several servers"):
            check_can_chain(config)
    last.connect("b").call(Join(**here.card("b", (2, 4)))).result()
    for client, told in (("a", Settle("a", 1)), ("b", gradient(1)), ("b", Settle("a", 1))):
        with pytest.raises(LinkError, match=r"only the server before may|trains as the server before says|never"):
            here.server.answer(client, told) if client == "a" else last.answer(client, told)
    alone = world("llama", base_depth=2).server
    alone.following = Following({"seed": "1"})
    with pytest.raises(LinkLostError, match="no server leads this one yet"):
        alone.answer("b", Join(**here.card("b", (2, 4))))
    with pytest.raises(LinkError, match="the server before has seed = 2, and this one 1"):
        Chain(alone.connect, Join(**here.card(PREVIOUS, (2, 4))), {"seed": "2"}, "")
    led = Following({}, Kept())
    led.check(Lead({}))  # from one that is led itself, and has not heard yet
    led.led = True
    with pytest.raises(LinkError, match="this server's state is of the run x, the server before goes on with y"):
        led.check(Lead({}, "y"))
    led.check(Lead({}, "x"))
    with pytest.raises(ConfigError, match=r"end before block 3, and the next server's begin at 2"):
        Chain(alone.connect, Join(**here.card(PREVIOUS, (3, 4))), {"seed": "1"}, "")


def test_with_tokens_nobody_but_the_server_before_comes_in() -> None:
    last = world("llama", base_depth=2)
    last.server.following = Following({})
    digests = {name: hashlib.sha256(name.encode()).digest() for name in ("a", PREVIOUS)}
    here = world("llama", end=2)
    with serve(last.server, tokens=Tokens(digests), bearer=PREVIOUS) as serving:

        def reach(name: str, token: str = PREVIOUS) -> Link:
            return connect(f"grpc://{serving.address}", name, token=token, codec="off")

        for name in ("a", PREVIOUS):
            with pytest.raises(LinkError, match="do not go together"):
                reach(name, "a")
        lead(here, reach)
        assert here.server.chain is not None
        here.join("a", (1, 4))
        for what in (request(1), gradient(1)):
            here.server.connect("a").call(what).result()
        assert last.server.shared.version == here.server.shared.version == 1
        assert list(here.server.chain.told.facts) == ["[2, 4)"]
        here.server.chain.close()
