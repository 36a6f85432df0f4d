"""``server.joined``: several clients' requests in one pass give each what it gets alone, up to rounding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import CodecConfig, OptimizerConfig, ServerConfig
from flexp.errors import BadValuesError, ConfigError
from flexp.links.grpc import connect, serve
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Leave
from flexp.server import Server
from flexp.server.joining import MOST_TOKENS, Pass, fits
from flexp.server.pace import Pace, curve_of
from tests.harness import copied, seeded, world

CUTS = {"a": (1, 4), "b": (2, 3), "c": (1, 3), "d": (1, 4)}
SIZES = {"a": (2, 9), "b": (3, 8), "c": (2, 9), "d": (2, 8)}
SGD = OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0, clip=None)


class Passes(list[int]):
    """How many were in each pass."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """A link's thread asks, and whatever can go together does."""
    found = Passes()

    def made(*args: Any, **options: Any) -> Pass:
        found.append(len(args[1]))
        return Pass(*args, **options)

    monkeypatch.setattr("flexp.server.exchanges.waiting_thread", lambda: None)
    monkeypatch.setattr("flexp.server.together.Pass", made)
    monkeypatch.setattr(Pace, "most", lambda _, __, waiting, **___: waiting)
    monkeypatch.setattr("flexp.server.together.curve_of", lambda *_: {5: 1.0})
    return found


def forwards(seed: int, padded: bool, positions: bool = False) -> dict[str, ForwardRequest]:
    found = {}
    for place, (client, (batch, length)) in enumerate(SIZES.items()):
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, : 2 + place] = 0  # on the left, as decoders have it
        mask = mask if padded and client != "d" else None
        z_BTH = torch.randn(batch, length, 32, generator=seeded(100 * seed + place))
        where = torch.arange(length)[None] if positions else None
        found[client] = ForwardRequest(seed, z_BTH, mask, positions_BT=where, train=True, step=seed)
    return found


def backwards(seed: int, asked: Mapping[str, ForwardRequest]) -> dict[str, BackwardRequest]:
    found = {}
    for place, (client, request) in enumerate(asked.items()):
        grad_BTH = 0.1 * torch.randn(request.hidden_BTH.shape, generator=seeded(100 * seed + place + 50))
        found[client] = BackwardRequest(seed, grad_BTH, step=seed, exchanges=1, weight=place + 1.0)
    return found


def server(name: str = "llama", tuning: str = "lora", *, joined: bool = True, **config: Any) -> Server:
    here = world(name, tuning=tuning, config=ServerConfig(joined=joined, **config), optimizer=SGD, dropout=0.0)
    for client, cut in CUTS.items():
        here.join(client, cut)
    here.server._together.draws = False
    return here.server


def all_of(here: Server, requests: Mapping[str, Any]) -> dict[str, Any]:
    """Their answers, or the futures of those that wait still."""
    answers = {client: here.answer(client, request) for client, request in requests.items()}
    while here.work() == 0.0:
        pass
    return {
        client: answer.result() if isinstance(answer, Future) and answer.done() else answer
        for client, answer in answers.items()
    }


def near(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(value.float(), other[name].float(), rtol=1e-4, atol=1e-6) for name, value in one.items()
    )


@pytest.mark.parametrize(
    ("name", "tuning", "padded", "config"),
    [
        ("llama", "lora", True, {}),
        ("llama", "lora", False, {"adapters": "own"}),
        ("gpt2", "lora", True, {"update": "mean", "mean_over": 4}),
        ("bert", "lora", True, {"adapters": "own", "memory": "recompute"}),
        ("llama", "frozen", True, {}),
    ],
)
def test_each_gets_what_it_gets_alone(
    name: str, tuning: str, padded: bool, config: dict[str, Any], passes: Passes
) -> None:
    together, alone = server(name, tuning, **config), server(name, tuning, joined=False, **config)
    start = copied(together.shared.updater.parameters)
    for step in (1, 2):
        asked = forwards(step, padded, positions=padded and name == "llama")
        for requests in (asked, backwards(step, asked)):
            got, wanted = all_of(together, requests), all_of(alone, requests)
            for client, answer in wanted.items():
                for field in ("hidden_BTH", "grad_BTH"):
                    if hasattr(answer, field):
                        one, other = getattr(got[client], field), getattr(answer, field)
                        mask = asked[client].mask_BT
                        where = slice(None) if mask is None else mask.bool()
                        assert torch.allclose(one[where], other[where], rtol=1e-4, atol=1e-6), (client, field)
    kept = {"memory": "recompute"}.items() <= config.items()
    assert passes == ([4, 4] * 2 if kept else [4] * 2)  # with its graph, a pass runs once
    for one, other in [(together.shared, alone.shared), *zip(together.own.values(), alone.own.values(), strict=True)]:
        assert near(copied(one.updater.parameters), copied(other.updater.parameters))
        assert one.version == other.version
    assert together.shared.peak_versions == 1  # all are let go of before the first update
    assert tuning == "frozen" or together.updates == alone.updates > 0
    assert tuning == "frozen" or config.get("adapters") == "own" or not near(start, together.shared.updater.parameters)


def test_no_more_go_together_than_memory_holds(passes: Passes) -> None:
    here = server(max_kept_bytes=1 << 20)
    here._sessions["a"].graph_rate = 500.0  # bytes a number: 7 x 9 tokens, 32 wide, fit, 9 x 9 do not
    asked = forwards(1, padded=True)
    all_of(here, asked)
    all_of(here, backwards(1, asked))
    assert max(passes) == 3
    assert here.shared.version == 4


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("how", ["leaves", "gives up and goes on", "is late", "is not finite"])
@pytest.mark.parametrize("adapters", ["shared", "own"])
def test_one_of_them(how: str, adapters: Any) -> None:
    """What one of a pass does is nobody else's concern."""
    together, alone = server(adapters=adapters), server(joined=False, adapters=adapters)
    asked = forwards(1, padded=True)
    back = backwards(1, asked)
    for here in (together, alone):
        all_of(here, asked)
        first = {client: back[client] for client in "abc"}
        if how == "is not finite":
            bad = back["d"].grad_BTH.clone()
            bad[0, 0, 0] = float("nan")
            first["d"] = BackwardRequest(1, bad, step=1, exchanges=1)
        elif how == "leaves":
            here.answer("d", Leave())
        elif how == "gives up and goes on":
            here.answer("d", Abort())
            again = ForwardRequest(2, asked["d"].hidden_BTH, None, train=True, step=1)
            all_of(here, {"d": again})
            all_of(here, {"d": BackwardRequest(2, back["d"].grad_BTH, step=1, exchanges=1)})
        if how != "is not finite":
            got = all_of(here, first)
        else:
            answers = {client: here.answer(client, request) for client, request in first.items() if client != "d"}
            with pytest.raises(BadValuesError, match=r"client d: .* not finite"):  # noqa: PT012
                answer: Any = here.answer("d", first["d"])
                while here.work() == 0.0:
                    pass
                answer.result(0)
            got = {client: value.result(5) if isinstance(value, Future) else value for client, value in answers.items()}
        if how == "is late" and here is together:
            assert not any(hasattr(value, "grad_BTH") for value in got.values())  # they wait a while
            for one in here._line.firsts():
                joint = one.session.pending[1].joint
                assert joint is not None
                joint.until = 0.0
            while here.work() == 0.0:
                pass
            got = {client: value.result(0) for client, value in got.items()}
        if how == "is late":
            got |= all_of(here, {"d": back["d"]})
        if here is together:
            mine = got
    for client, answer in got.items():
        mask = asked[client].mask_BT
        where = slice(None) if mask is None else mask.bool()
        assert torch.allclose(mine[client].grad_BTH[where], answer.grad_BTH[where], rtol=1e-4, atol=1e-6)
    for one, other in [(together.shared, alone.shared), *zip(together.own.values(), alone.own.values(), strict=True)]:
        assert near(copied(one.updater.parameters), copied(other.updater.parameters))


def test_what_has_no_memory_together_is_answered_one_by_one(passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **_: Any) -> Any:
        passes.append(len(args[1]))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("flexp.server.together.Pass", full)
    together, alone = server(), server(joined=False)
    asked = forwards(1, padded=True)
    for requests in (asked, backwards(1, asked)):
        got, wanted = all_of(together, requests), all_of(alone, requests)
        for client, answer in wanted.items():
            field = "grad_BTH" if hasattr(answer, "grad_BTH") else "hidden_BTH"
            assert torch.equal(getattr(got[client], field), getattr(answer, field))
    assert passes == [4]
    assert together.shared.version == alone.shared.version == 4


def test_where_it_is_not_for() -> None:
    with pytest.raises(ConfigError, match=r"server.joined cannot be had of these blocks: .* for LoRA"):
        server(tuning="full")
    here = world("llama", tuning="lora", config=ServerConfig(joined=True), dropout=0.1)
    assert not here.server._together.draws


@pytest.mark.usefixtures("passes")
def test_who_draws_dropout_goes_alone(caplog: pytest.LogCaptureFixture) -> None:
    here = world("llama", tuning="lora", config=ServerConfig(joined=True), optimizer=SGD, dropout=0.1)
    for client, cut in CUTS.items():
        here.join(client, cut)
    for step in (1, 2):
        asked = forwards(step, padded=True)
        all_of(here.server, asked)
        all_of(here.server, backwards(step, asked))
    assert here.server.shared.version == 8
    assert caplog.text.count("server.joined has no effect") == 1


GAIN = {5: 1.0, 6: 0.6, 7: 0.4, 8: 0.3}
"""Seconds a token of one request of 16, 32, 64, 128 tokens, where several are expected to pay."""
FLAT = dict.fromkeys(GAIN, 1.0)


def served(
    curve: Mapping[int, float], seconds: Callable[[str, int], float], waiting: int, passes: int
) -> tuple[list[int], list[float]]:
    """How many were in each pass of a server whose clock is ``seconds`` of a pass of so many; and of every tenth of
    them one by one ÷ as they were."""
    pace, found, times = Pace(), [], []
    pace.curve = curve
    for _ in range(passes):
        members = pace.most(16, waiting)
        took = [seconds(kind, members) for kind in ("forward", "backward")]
        for kind, each in zip(("forward", "backward"), took, strict=True):
            pace.note(kind, members, [16] * members, each)
        found.append(members)
        times.append((members * sum(seconds(kind, 1) for kind in ("forward", "backward")), sum(took)))
    parts = [times[at : at + passes // 10] for at in range(0, passes, passes // 10)]
    return found, [sum(alone for alone, _ in part) / sum(joined for _, joined in part) for part in parts]


def test_as_many_go_together_as_pay() -> None:
    found, ratios = served(GAIN, lambda _, members: 0.8 + 0.2 * members, 9, 200)
    assert found[:7] == [1, 1, 1, 9, 9, 9, 9]
    assert min(ratios) > 2.5
    found, ratios = served(GAIN, lambda _, members: members * [1.0, 0.7, 1.5, 1.5][members.bit_length() - 1], 9, 400)
    assert found[200:].count(3) > 190  # eight are too many, two or three pay
    assert ratios[-1] > 1.35


@pytest.mark.parametrize(
    "seconds",
    [
        lambda _, members: float(members),
        lambda _, members: members * (1.0 if members == 1 else 1.4),
        lambda kind, members: members * (1.0 if members == 1 else 0.6 if kind == "forward" else 1.6),  # run again
    ],
    ids=["no gain", "a loss", "a loss backwards"],
)
def test_it_is_never_slower(seconds: Callable[[str, int], float]) -> None:
    """Where the start expects nothing of it, from the first request on; else after nine passes that try it."""
    found, ratios = served(FLAT, seconds, 8, 2000)
    assert ratios[0] > 0.99
    assert min(ratios) > 0.98  # what is tried now and then
    assert found[:100] == [1] * 100
    assert max(found) > 1
    found, ratios = served(GAIN, seconds, 8, 2000)
    assert [members > 1 for members in found[:100]].count(True) == 9
    assert min(ratios[1:]) > 0.98


def test_what_the_start_expects_is_measured_again() -> None:
    """A moment decides nothing: the first time, and what else the machine does, take longer; what lasts is seen."""
    calls = 0

    def busy(_: str, members: int) -> float:
        nonlocal calls
        calls += 1
        return members * (20.0 if calls in (1, 2, 15, 200) else 1.0) * (1.2 if members > 1 else 1.0)

    found, _ = served(GAIN, busy, 4, 600)
    assert sum(members > 1 for members in found[30:]) < 12
    for curve in (GAIN, FLAT, {}):
        found, _ = served(curve, lambda _, members: members * (0.5 if members > 1 else 1.0), 4, 2000)
        assert found[-100:].count(4) > 90
    found, _ = served(GAIN, lambda _, members: members * (2.0 if members > 1 else 1.0), 4, 2000)
    assert found[-100:].count(1) > 90


def test_the_start_measures_a_block_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    here, before = server().shared, torch.get_rng_state()
    weights = copied(here.updater.parameters)
    monkeypatch.setattr("flexp.server.pace.START_SECONDS", 60.0)
    curve = curve_of(here.stage, 1, {name: weights[name] for name in weights if here.stage.within(name, 1, 2)})
    assert [*curve] == list(range(5, MOST_TOKENS.bit_length() + 1))
    assert curve[5] > 2 * curve[8] > 0  # a pass has a price of its own
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, here.updater.parameters[name]) for name, value in weights.items())
    monkeypatch.setattr("flexp.server.pace.START_SECONDS", 0.0)  # of a block that takes long it has but two sizes
    assert [*curve_of(here.stage, 1, {})] == [5, 6]


@pytest.mark.parametrize("joined", [True, False])
def test_the_start_is_the_first_to_join_over_a_link(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr("flexp.server.together.curve_of", lambda *args: measured.append(args[1]) or GAIN)
    assert server(joined=joined)._together.pace.curve == {}
    monkeypatch.setattr("flexp.server.server.waiting_thread", lambda: None)
    assert server(joined=joined)._together.pace.curve == (GAIN if joined else {})
    assert measured == [1] * joined


def test_what_only_looks_is_judged_by_itself() -> None:
    pace = Pace()
    pace.curve = GAIN
    for _ in range(3):
        pace.note("look", 1, [16], 1.0)
    assert pace.most(16, 4) == 1
    assert pace.most(16, 4, train=False) == 4
    assert pace.most(999, 4, train=False) == 1


def test_what_fits_in_a_pass() -> None:
    assert fits([(1, 16), (1, 13)])
    assert not fits([(1, 16), (4, 4)])
    assert not fits([(8, 128), (8, 128)])


def test_no_graph_is_made_that_has_no_room(passes: Passes, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []

    def made(*args: Any, grad: bool, **options: Any) -> Pass:
        grads.append(grad)
        return Pass(*args, grad=grad, **options)

    monkeypatch.setattr("flexp.server.together.Pass", made)
    here = server(max_kept_bytes=1 << 20)
    here._sessions["a"].graph_rate = 320.0  # of 829 kB, but the largest has more than its quarter of the room
    asked = forwards(1, padded=True)
    all_of(here, asked)
    all_of(here, backwards(1, asked))
    assert grads[0] is False
    assert here.shared.version == 4


def test_over_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters of their own, clients' losses depend on nobody, so they are those of one after the other."""
    together = 0

    def made(*args: Any, **options: Any) -> Pass:
        nonlocal together
        together += 1
        return Pass(*args, **options)

    monkeypatch.setattr("flexp.server.together.Pass", made)
    monkeypatch.setattr(Pace, "most", lambda _, __, waiting, **___: waiting)
    monkeypatch.setattr("flexp.server.together.curve_of", lambda *_: {5: 1.0})
    found: dict[bool, dict[str, list[float]]] = {}
    for joined in (True, False):
        here = world("llama", tuning="lora", config=ServerConfig(joined=joined, adapters="own"), optimizer=SGD)
        losses = found[joined] = {}
        failed: list[BaseException] = []

        def work(client: str, link: Any, losses: Any = losses, here: Any = here, failed: Any = failed) -> None:
            try:
                model = here.client(client, CUTS[client], link=link, codec=CodecConfig())
                losses[client] = []
                for step in range(4):
                    loss = model(**here.batch(seed=step, padding="right")).loss
                    loss.backward()
                    losses[client].append(loss.item())
            except BaseException as error:
                failed.append(error)

        if joined:
            with serve(here.server) as serving:
                links = {client: connect(f"grpc://{serving.address}", client) for client in CUTS}
                threads = [threading.Thread(target=work, args=item) for item in links.items()]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                for link in links.values():
                    link.close()
        else:
            for client in CUTS:
                work(client, here.server.connect(client))
        assert not failed
    assert together > 0
    for client in CUTS:
        assert found[True][client] == pytest.approx(found[False][client], rel=1e-5)
