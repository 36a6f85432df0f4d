"""A client that follows: it trains none of its aligned blocks, but teaches the server's, and takes them over."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from flexp.client.recut import ParkedInMemory, fit, move_party, recut
from flexp.client.trainer import Trainer, cut_in, load_party, party_state
from flexp.config import AlignConfig, CodecConfig, OptimizerConfig, TrainConfig
from flexp.data.types import ClientData
from flexp.errors import LinkLostError
from flexp.links.asking import PullReply, PullRequest
from flexp.links.base import Link
from flexp.links.declaring import Request
from flexp.links.messages import Leave
from flexp.links.opening import loopback
from flexp.optim import Updater
from tests.client.test_recut import Words, blocks_of, model_of
from tests.harness import RecordingLink, World, copied, equal, shared_weights, world

R = TypeVar("R")
SGD = OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, clip=None)
ADAMW = OptimizerConfig(name="adamw", lr=1e-3, clip=None)


def follow(every: int = 1, pull: float = 1.0) -> AlignConfig:
    return AlignConfig(kind="weights", teach=True, follow=True, every=every, pull=pull)


def client(
    here: World, cut: tuple[int, int], align: AlignConfig, optimizer: OptimizerConfig = SGD, link: Link | None = None
) -> Trainer:
    model = here.client("a", cut, align, link=link)
    batch = here.batch(batch=12, length=6)
    examples = [{name: value[row] for name, value in batch.items()} for row in range(12)]
    data = ClientData("a", train=examples, test=[], validation=[])  # type: ignore[arg-type]
    updater = Updater(model.stage.trainable(), optimizer)
    return Trainer(data, Words(), model, updater, TrainConfig(batch_size=4), seed=3)  # type: ignore[arg-type]


def aligned(here: World, trainer: Trainer) -> dict[str, Tensor]:
    """The client's copies of blocks [1, s)."""
    model = model_of(trainer)
    found = model.personal_state()
    return {name: value for name, value in found.items() if 1 <= (model.stage.block_of(name) or 0) < model.cut[0]}


@pytest.mark.parametrize(
    ("name", "optimizer", "tuning"),
    [("llama", SGD, "full"), ("llama", ADAMW, "lora"), ("bert", SGD, "lora"), ("bert", ADAMW, "full")],
)
def test_alone_and_in_every_step_it_trains_the_very_model_of_a_shallow_cut(
    name: str, optimizer: OptimizerConfig, tuning: str
) -> None:
    shallow, deep = (world(name, optimizer=optimizer, tuning=tuning) for _ in range(2))
    left = client(shallow, (1, 4), AlignConfig(kind="off"), optimizer)
    right = client(deep, (3, 4), follow(), optimizer)
    start = shared_weights(deep.server) | model_of(left).personal_state()
    model_of(right).load_personal_state({key: start[key] for key in model_of(right).personal_state()})
    for _ in range(5):
        assert left.step().loss == right.step().loss
    assert equal(shared_weights(shallow.server), shared_weights(deep.server))
    copies = aligned(deep, right)
    assert copies
    assert all(torch.equal(value, shared_weights(deep.server)[key]) for key, value in copies.items())
    own = {key: value for key, value in model_of(right).personal_state().items() if key not in copies}
    assert equal(own, model_of(left).personal_state())


def test_its_copies_change_by_pulling_alone_and_cost_no_gradient_and_no_optimiser() -> None:
    here = world("llama", optimizer=SGD)
    trainer = client(here, (3, 4), follow(every=3, pull=0.5), ADAMW)
    start = copied(aligned(here, trainer))
    for step in (1, 2):
        trainer.step()
        assert equal(copied(aligned(here, trainer)), start), step
    trainer.step()
    shared = shared_weights(here.server)
    for name, value in aligned(here, trainer).items():
        torch.testing.assert_close(value, start[name].lerp(shared[name], 0.5), rtol=0, atol=0)
        assert not torch.equal(value, start[name])
    stage = model_of(trainer).stage
    assert not start.keys() & stage.trainable().keys()
    assert stage.own().keys() == stage.trainable().keys() | start.keys()
    assert not any(name in start for entry in trainer.updater.state() for name in [entry.partition("/")[2]])
    assert all(value.grad is None for name, value in stage.own().items() if name in start)


def test_it_goes_on_from_its_state_bit_for_bit() -> None:
    """Its copies are neither the pretrained weights nor what the server has by then, so they are part of it."""
    here, there = world("llama", optimizer=SGD), world("llama", optimizer=SGD)
    left = client(here, (3, 4), follow(every=3))
    for _ in range(4):
        left.step()
    saved = {name: value.clone() for name, value in party_state(left).items()}
    server = {name: value.clone() for name, value in here.server.state().items()}
    right = client(there, (3, 4), follow(every=3))
    there.server.load(server)
    load_party(right, saved)
    for _ in range(3):
        assert left.step().loss == right.step().loss
    assert equal(shared_weights(here.server), shared_weights(there.server))
    assert equal(copied(model_of(left).personal_state()), copied(model_of(right).personal_state()))


def test_over_grpc_it_is_the_one_in_process() -> None:
    found = []
    for remote in (False, True):
        here = world("bert", optimizer=SGD)
        if remote:
            with loopback(here.server, "a") as link:
                trainer = client(here, (3, 4), follow(every=2), link=link)
                losses = [trainer.step().loss for _ in range(4)]
        else:
            trainer = client(here, (3, 4), follow(every=2))
            losses = [trainer.step().loss for _ in range(4)]
        found.append((losses, shared_weights(here.server), copied(model_of(trainer).personal_state())))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])
    assert equal(found[0][2], found[1][2])


def test_where_its_cut_moves_what_comes_is_followed_and_what_goes_is_not(tmp_path: Path) -> None:
    here = world("llama", optimizer=SGD)
    trainer = client(here, (2, 4), follow(every=2))
    model, parking = model_of(trainer), ParkedInMemory()
    followed: list[set[int | None]] = []
    for cut in ((2, 4), (2, 3), (1, 4), (3, 4)):
        if cut != model.cut:
            recut(trainer, cut, blocks_of(here), parking)
        trainer.step()
        followed.append({model.stage.block_of(name) for name in model.stage.followed})
        trained = {model.stage.block_of(name) for name in trainer.updater.parameters}
        assert trained == {0, None} | set(range(cut[1], 4))
    assert followed == [{1}, {1}, set(), {1, 2}]
    state = party_state(trainer)
    other = client(world("llama", optimizer=SGD), (1, 4), follow(every=2))
    fit(other, cut_in(state) or (0, 0), blocks_of(here))
    load_party(other, state)
    assert equal(copied(model_of(other).personal_state()), copied(model.personal_state()))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("path", [[(1, 2), (1, 4), (3, 4)], [(3, 4), (1, 4), (3, 4)], [(1, 2), (3, 4)]], ids=str)
def test_what_it_is_to_follow_starts_from_the_servers_whatever_it_had(
    path: list[tuple[int, int]], optimizer: OptimizerConfig
) -> None:
    """A tail of its own, parked or not, copies of long ago: of the blocks [1, 3) the server's are what counts."""
    here = world("llama", optimizer=SGD)
    trainer, parking = client(here, path[0], follow(every=100), optimizer), ParkedInMemory()
    for cut in path:
        recut(trainer, cut, blocks_of(here), parking)
        shared = shared_weights(here.server)
        assert all(torch.equal(value, shared[name]) for name, value in aligned(here, trainer).items()), cut
        for _ in range(3):
            trainer.step()
    assert {model_of(trainer).stage.block_of(name) for name in model_of(trainer).stage.followed} == {1, 2}


def test_a_tail_that_becomes_followed_is_parked_and_comes_back_as_it_was() -> None:
    here = world("llama", optimizer=SGD)
    trainer, parking = client(here, (1, 2), follow(), ADAMW), ParkedInMemory()
    trainer.step()
    before = copied(model_of(trainer).personal_state())
    recut(trainer, (3, 4), blocks_of(here), parking)
    trainer.step()
    recut(trainer, (1, 2), blocks_of(here), parking)
    after = model_of(trainer).personal_state()
    tail = [name for name in after if model_of(trainer).stage.block_of(name) == 2]
    assert tail
    assert all(torch.equal(after[name], before[name]) for name in tail)


def test_it_goes_on_with_another_cut_from_what_it_saved() -> None:
    here = world("llama", optimizer=SGD)
    left = client(here, (1, 2), follow(every=100), ADAMW)
    for _ in range(3):
        left.step()
    state = {name: value.clone() for name, value in party_state(left).items()}
    right, parking = client(here, (3, 4), follow(every=100), ADAMW), ParkedInMemory()
    move_party(right, state, parking)
    shared = shared_weights(here.server)
    assert all(torch.equal(value, shared[name]) for name, value in aligned(here, right).items())
    assert set(parking.blocks) == {2, 3}  # its tail, of which it follows one block now, and the server has the other
    assert right.steps == 3
    right.step()


def test_who_comes_to_a_trained_server_takes_its_copies_over() -> None:
    here = world("llama", optimizer=SGD)
    first = client(here, (1, 4), AlignConfig(kind="off"))
    for _ in range(3):
        first.step()
    here.server.answer("a", Leave())
    late, shared = client(here, (3, 4), follow(every=100)), shared_weights(here.server)
    assert all(torch.equal(value, shared[name]) for name, value in aligned(here, late).items())


@pytest.mark.parametrize("every", [1, 2])
def test_a_loop_that_knows_nothing_of_flexp_pulls_when_its_next_step_begins(every: int) -> None:
    here, there = world("llama", optimizer=SGD), world("llama", optimizer=SGD)
    told = client(here, (3, 4), follow(every=every))
    model = there.client("a", (3, 4), follow(every=every))
    optimizer = torch.optim.SGD(model.stage.trainable().values(), lr=0.05, momentum=0.9)
    for _ in range(5):
        losses = told.step().loss
        indices = told._order.indices(told.steps - 1)
        batch = told.task.collate([told.data.train[index] for index in indices])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == losses
    model.after_step()
    assert equal(copied(model_of(told).personal_state()), copied(model.personal_state()))


@pytest.mark.parametrize("settings", [{"kind": "kl", "teach": True}, {"kind": "weights"}, {"kind": "off"}])
def test_who_follows_must_teach_and_pull(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match='follow needs kind = "weights" and teach = true'):
        AlignConfig(follow=True, **settings)


@pytest.mark.parametrize("codec", [CodecConfig(), CodecConfig(weights="bf16")])
def test_what_it_has_does_not_come_again_and_what_comes_is_coded(codec: CodecConfig) -> None:
    here = world("llama")
    model = here.client("a", (3, 4), follow(), codec=codec)
    link = model.link = RecordingLink(model.link)
    model.take_over()  # what it holds is what nobody has trained yet
    here.server.shared.updater.parameters["model.layers.1.mlp.up_proj.weight"].data.add_(0.3)
    model.take_over()
    nothing, one = (list(reply.weights) for reply in link.sent(PullReply))
    assert (nothing, one) == ([], ["model.layers.1.mlp.up_proj.weight"])
    own = model.personal_state()[one[0]]
    theirs = shared_weights(here.server)[one[0]]
    assert torch.equal(own, theirs if codec.exact else theirs.bfloat16().float())
    assert link.meter.training.bytes_down == own.nbytes // (1 if codec.exact else 2)
    model.take_over()  # what came in another form is known, too
    assert link.meter.training.bytes_down == own.nbytes // (1 if codec.exact else 2)


class Breaking(RecordingLink):
    """Loses the third answer to a pull."""

    def call(self, request: Request[R]) -> Future[R]:
        reply = super().call(request)
        if sum(isinstance(message, PullRequest) for _, message in self.messages) == 3:
            reply = Future()
            reply.set_exception(LinkLostError("lost"))
        return reply


def test_a_pull_that_was_cut_off_goes_on_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexp.client.taking.MOST", 1)  # each tensor in an answer of its own
    here = world("llama")
    trainer = client(here, (3, 4), AlignConfig(kind="weights", pull=0.25))
    model, before = model_of(trainer), {}
    for value in here.server.shared.updater.parameters.values():
        value.data.add_(0.1)
    model.link = Breaking(model.link)

    def step() -> None:
        model.steps.done = 1  # as after a step whose pull is due
        before.update(copied(aligned(here, trainer)))
        model.after_step()

    with pytest.raises(LinkLostError):
        step()
    assert equal(before, aligned(here, trainer))  # nothing is taken over before all is here
    link = RecordingLink(model.link.inner)
    model.rejoin(link)
    model.after_step()
    theirs = shared_weights(here.server)
    came = [name for reply in link.sent(PullReply) for name in reply.weights]
    assert len(came) == len(set(came)) == len(before) - 2
    for name, value in aligned(here, trainer).items():
        torch.testing.assert_close(value, before[name] + 0.25 * (theirs[name] - before[name]))
