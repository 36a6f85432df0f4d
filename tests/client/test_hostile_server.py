"""A server that answers what nobody asked for, or what nobody can use: the client refuses it and stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.meeting import LAST
from flexp.client.model import SplitModel
from flexp.client.taking import fetched
from flexp.config import AlignConfig
from flexp.config.loading import validate
from flexp.errors import FlexpError, LinkError, LinkLostError
from flexp.links.asking import FetchRequest, PullRequest
from flexp.links.base import Link, finished
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest, ForwardRequest, Join, Order, Refusal, Welcome
from flexp.links.wrapping import Wrapping
from tests.harness import World, copied, equal, world

NAN = float("nan")
EVERY = AlignConfig(kind="kl", at="every-block")
PULL = AlignConfig(kind="weights", pull=0.5)
OFF = AlignConfig(kind="off")
Lie = Callable[[Any], Any]


class Lying(Wrapping):
    """Hands on what the server says, but for one kind of answer once ``lie`` is set."""

    def __init__(self, inner: Link) -> None:
        super().__init__(inner)
        self.asked: type[Request[Any]] | None = None
        self.lie: Lie = lambda reply: reply

    def call(self, request: Request[Any]) -> Future[Any]:
        if type(request) is not self.asked:
            return self.inner.call(request)
        reply = self.inner.call(request).result()
        return finished(lambda: self.lie(reply))


def joined(align: AlignConfig = OFF, cut: tuple[int, int] = (3, 4)) -> tuple[World, SplitModel, Lying]:
    here = world("llama")
    link = Lying(here.server.connect("a"))
    return here, here.client("a", cut, align, link=link), link


def spoilt(value: Tensor, number: float = NAN) -> Tensor:
    value = value.clone()
    value.view(-1)[3] = number
    return value


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Lie:
    return lambda reply: replace(reply, weights=change(dict(reply.weights)))


def first(found: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    name = min(found)
    return {**found, name: change(found[name])}


STEPS: dict[str, tuple[AlignConfig, type[Request[Any]], Lie, str]] = {
    "activations that are no numbers": (
        OFF, ForwardRequest, lambda reply: replace(reply, hidden_BTH=spoilt(reply.hidden_BTH)), "activation of exchange"
    ),
    "infinite activations": (
        OFF, ForwardRequest, lambda reply: replace(reply, hidden_BTH=spoilt(reply.hidden_BTH, float("inf"))),
        "lower train.shared.lr",
    ),
    "an alignment that was not asked for": (
        OFF, ForwardRequest, lambda reply: replace(reply, align=0.5), "though nothing was sent for it"
    ),
    "what only a server before it asks for": (
        EVERY, ForwardRequest, lambda reply: replace(reply, teachers=(reply.hidden_BTH,)), "only another server asks"
    ),
    "an alignment that is no number": (
        EVERY, ForwardRequest, lambda reply: replace(reply, align=NAN), "expected a finite number"
    ),
    "gradients that are no numbers": (
        OFF, BackwardRequest, lambda reply: replace(reply, grad_BTH=spoilt(reply.grad_BTH)), "gradient of exchange"
    ),
    "infinite gradients": (
        OFF, BackwardRequest, lambda reply: replace(reply, grad_BTH=spoilt(reply.grad_BTH, -float("inf"))),
        "not finite",
    ),
    "unasked inner gradients": (
        OFF, BackwardRequest, lambda reply: replace(reply, inner_BTH=(reply.grad_BTH,)), "at 1 inner .* expected 0"
    ),
    "no inner gradients": (
        EVERY, BackwardRequest, lambda reply: replace(reply, inner_BTH=()), "at 0 inner .* expected 1"
    ),
    "too many inner gradients": (
        EVERY, BackwardRequest, lambda reply: replace(reply, inner_BTH=(reply.grad_BTH,) * 3), "at 3 inner"
    ),
    "inner gradients that are no numbers": (
        EVERY, BackwardRequest, lambda reply: replace(reply, inner_BTH=(spoilt(reply.grad_BTH),)), "not finite"
    ),
    "somebody's classifier": (
        PULL, PullRequest, weights(lambda found: {**found, "lm_head.weight": torch.zeros(3)}), "nobody asked for"
    ),
    "the block below s_min": (
        PULL, PullRequest,
        weights(lambda found: found | {name.replace("layers.1.", "layers.0."): found[name] for name in found}),
        r"layers\.0\..* nobody asked for",
    ),
    "weights that are no numbers": (
        PULL, PullRequest, weights(lambda found: first(found, spoilt)), "not finite"
    ),
    "weights of another shape": (
        PULL, PullRequest, weights(lambda found: first(found, lambda value: value[:1])), "expected"
    ),
    "not all weights": (
        PULL, PullRequest, weights(lambda found: dict(list(found.items())[1:])), "leaves out"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str) -> None:
    align, asked, lie, said = STEPS[name]
    here, model, link = joined(align)
    before = copied(model.personal_state())
    link.asked, link.lie = asked, lie

    def step() -> None:
        model(**here.batch()).loss.backward()
        model.after_step()

    with pytest.raises(LinkError, match=said) as raised:
        step()
    assert "\n" not in str(raised.value)
    assert equal(before, copied(model.personal_state()))


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (weights(lambda found: first(found, spoilt)), "not finite"),
        (lambda reply: replace(reply, total=10**12), "of 1000000000000 weights"),
        (lambda reply: replace(reply, total=-1), "of -1 weights"),
        (weights(lambda found: {str(number): torch.zeros(1 << 20) for number in range(5)}), "sends 20971520 bytes"),
        (lambda reply: replace(reply, weights={}), "gives 0 of the"),
    ],
)
def test_a_block_that_is_fetched(lie: Lie, said: str) -> None:
    _, _, link = joined()
    link.asked, link.lie = FetchRequest, lie
    with pytest.raises(LinkError, match=said):
        list(fetched(link, FetchRequest(2)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": 64}, "blocks of width 64"),
        ({"blocks": 10**9}, "1000000000 blocks"),
        ({"max_in_flight": 0}, "lets 0 exchanges"),
        ({"base_depth": 2}, "base depth s_min is 2, and 1 was agreed on"),
        ({"base_depth": 0}, "base depth s_min is 0, and 1 was agreed on"),
    ],
)
def test_what_is_agreed_on_joining(changes: dict[str, Any], said: str) -> None:
    _, model, link = joined()
    link.asked, link.lie = Join, lambda reply: replace(reply, **changes)
    with pytest.raises(LinkError, match=said):
        model.rejoin()
    assert (model.cut, model.base_depth) == ((3, 4), 1)


def test_a_client_may_say_the_base_depth_first() -> None:
    """A server of base depth 1 gets the activations behind one block from every client that aligns."""
    here = world("llama")
    with pytest.raises(LinkError, match="s_min is 1, and 2 was agreed on"):
        here.client("a", (3, 4), EVERY, base_depth=2)
    assert here.client("a", (3, 4), EVERY, base_depth=1).base_depth == 1


@pytest.mark.parametrize(
    "order",
    [
        Order("step", "run", count=10**12),
        Order("step", "run", count=0),
        Order("evaluate", "run", number=-1),
        Order("save", "run", save=-5),
        Order("stop", "r" * 10_000),
        Order("meet", "run", number=2),
        Order("average", "run", number=1),
        Order("meet", "run"),  # once more
        Order("step", "another", count=1),
    ],
)
def test_orders_that_no_server_of_this_run_gives(order: Order, tmp_path: Path) -> None:
    from flexp.run.party import Party

    party = Party.__new__(Party)
    train, meet = {"rounds": 5, "steps_per_round": 4}, {"meet": {"on": True}}
    content = {"model": {"id": "m"}, "data": {"source": "d"}, "train": train, "method": meet}
    party.config, party._run = validate(content, "here"), "run"
    party.trainer = type("Trainer", (), {"steps": 12, "name": "a"})()  # type: ignore[assignment]
    party._gathering = type("Gathering", (), {"met": 1})()  # type: ignore[assignment]
    party.snapshots = type("Store", (), {"numbers": lambda _: [0]})()  # type: ignore[assignment]
    party._judge(Order("step", "run", count=8))
    party._judge(Order("meet", "run", number=LAST))
    with pytest.raises(LinkError):
        party._judge(order)
    party.snapshots = type("Store", (), {"numbers": lambda _: []})()  # type: ignore[assignment]
    party.trainer.steps = 0
    party._judge(Order("meet", "run"))  # of a server that fell before anybody had saved, so that all begin again


@pytest.mark.parametrize("again", [True, False])
def test_a_refusal_cannot_write_on_the_terminal(again: bool) -> None:
    error = Refusal("\x1b]0;pwned\x07\x1b[2Jall \u202ewell\nflexp: done\ud800" + "x" * 10**6, again).as_error()
    assert type(error) is (LinkLostError if again else LinkError)
    said = str(error)
    assert said.isprintable()
    assert len(said) < 5000
    assert said.startswith(r"\x1b]0;pwned\x07\x1b[2Jall \u202ewell\x0aflexp: done\ud800xxx")


@pytest.mark.parametrize("letter", ["\x1b", "\x9b", "\r", "\n", "\x00", "\u2028", "\u202e", "\ud800"])
def test_no_error_can(letter: str) -> None:
    assert str(FlexpError(f"column {letter}[31m")).isprintable()


def test_a_server_cannot_name_frames_that_there_is_no_memory_for() -> None:
    from flexp.links.frames import Field, Head
    from flexp.links.rules import Agreement, bounded, check_reply

    here, _, _ = joined()
    join = Join(**here.card("a", (3, 4)))
    welcome = bounded(Welcome(1, 5, 32, 8, 2**40, 2**62))
    assert welcome.frame_bytes == 256 << 20
    head = Head("PullReply", 1, fields=(Field("weights.x", torch.float32, (1 << 28,)),))
    with pytest.raises(LinkError, match="at most 268435456"):
        check_reply(head, Head("PullRequest", 1), Agreement.of(join, welcome))
