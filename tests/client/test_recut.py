"""Moving a cut in the middle of training: what stays, what comes, what goes, and what never changes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexp.client.model import SplitModel
from flexp.client.recut import ParkedInMemory, fit, move_party, recut
from flexp.client.trainer import Trainer, cut_in, load_party, party_state
from flexp.config import OptimizerConfig, TrainConfig
from flexp.data.types import ClientData
from flexp.errors import ConfigError, LinkError, LinkLostError, ModelError, StorageError
from flexp.links.asking import FetchRequest
from flexp.links.base import Link
from flexp.links.opening import loopback
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.optim import Updater
from flexp.run.store import ParkedOnDisk
from tests.harness import World, copied, equal, party, shared_weights, world

SGD = OptimizerConfig(name="sgd", lr=0.05, clip=None)
ADAMW = OptimizerConfig(name="adamw", lr=1e-3, clip=None)


class Words:
    """A task whose examples are rows of a tiny batch."""

    model_kind, metric, higher_is_better = "sequence-classification", "accuracy", True

    def collate(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def client(
    here: World,
    cut: tuple[int, int],
    optimizer: OptimizerConfig,
    link: Link | None = None,
    numbering: int | None = None,
) -> Trainer:
    model = here.client("a", cut, link=link, numbering=numbering)
    batch = here.batch(batch=12, length=6)
    examples = [{name: value[row] for name, value in batch.items()} for row in range(12)]
    updater = Updater(model.stage.trainable(), optimizer)
    data = ClientData("a", train=examples, test=[], validation=[])  # type: ignore[arg-type]
    return Trainer(data, Words(), model, updater, TrainConfig(batch_size=4), seed=3)  # type: ignore[arg-type]


def blocks_of(here: World) -> Callable[[Part], Stage]:
    return lambda part: party(here.whole, part, here.tuning)


def model_of(trainer: Trainer) -> SplitModel:
    assert isinstance(trainer.model, SplitModel)
    return trainer.model


def all_weights(here: World, trainer: Trainer) -> dict[str, Tensor]:
    """The model that client and server make up together."""
    model = model_of(trainer)
    middle = range(*model.cut)
    shared = shared_weights(here.server).items()
    held = {name: value for name, value in shared if here.server.shared.stage.block_of(name) in middle}
    return held | copied(model.stage.trainable())


def test_taking_blocks_over_changes_nothing_of_what_is_trained() -> None:
    """With one client and SGD, a model whose blocks wander to the client is trained as the one that stays split."""
    still, moving = world("llama", optimizer=SGD), world("llama", optimizer=SGD)
    left, right = client(still, (1, 4), SGD), client(moving, (1, 4), SGD)
    parking = ParkedInMemory()
    for step in range(6):
        if step == 2:
            done = recut(right, (2, 4), blocks_of(moving), parking)
            assert (done.before, done.after, done.came, done.restored, done.went) == ((1, 4), (2, 4), (1,), (), ())
        if step == 4:
            assert recut(right, (2, 3), blocks_of(moving), parking).came == (3,)
        assert left.step().loss == right.step().loss
    assert equal(all_weights(still, left), all_weights(moving, right))


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_that_come_start_from_what_the_server_has_now_and_those_that_come_back_from_where_they_ended(
    name: str, tuning: str
) -> None:
    here = world(name, tuning=tuning, optimizer=ADAMW)
    trainer, parking = client(here, (2, 4), ADAMW), ParkedInMemory()
    model, blocks = model_of(trainer), blocks_of(here)
    for _ in range(2):
        trainer.step()
    ended = of_block(trainer, 1)
    recut(trainer, (1, 4), blocks, parking)
    assert not of_block(trainer, 1)
    assert model.cut == here.server.cut_of("a") == (1, 4)
    for _ in range(2):
        trainer.step()
    recut(trainer, (3, 4), blocks, parking)
    own, shared = model.stage.trainable(), shared_weights(here.server)
    second = [name for name in own if model.stage.block_of(name) == 2]
    assert second
    assert all(torch.equal(own[name], shared[name]) for name in second)  # new to the client
    assert equal(of_block(trainer, 1), ended)  # back, with its optimiser's state
    assert trainer.updater.state().keys() & {f"exp_avg/{name}" for name in second} == set()  # none for what is new
    trainer.step()
    assert f"exp_avg/{second[0]}" in trainer.updater.state()
    assert trainer.steps == 5


def test_a_move_that_the_server_refuses_or_that_the_link_breaks_leaves_everything_as_it_was() -> None:
    here, same = world("llama", optimizer=ADAMW, base_depth=2), world("llama", optimizer=ADAMW, base_depth=2)
    trainer, other = client(here, (3, 4), ADAMW), client(same, (3, 4), ADAMW)
    trainer.step(), other.step()
    with pytest.raises(LinkError, match="needs blocks that the server does not hold"):
        recut(trainer, (1, 4), blocks_of(here), ParkedInMemory())
    with pytest.raises(ConfigError, match="does not fit a model of 4 blocks"):
        recut(trainer, (1, 9), blocks_of(here), ParkedInMemory())
    model = model_of(trainer)
    call = model.link.call

    def broken(request: Any) -> Any:
        if isinstance(request, FetchRequest):
            raise LinkLostError("gone")
        return call(request)

    recut(trainer, (2, 4), blocks_of(here), ParkedInMemory())  # (to have blocks to pull)
    recut(other, (2, 4), blocks_of(same), ParkedInMemory())
    model.link.call = broken  # type: ignore[method-assign]
    with pytest.raises(LinkLostError):
        recut(trainer, (3, 4), blocks_of(here), ParkedInMemory())
    model.link.call = call  # type: ignore[method-assign]
    assert model.cut == here.server.cut_of("a") == (2, 4)
    assert trainer.step().loss == other.step().loss
    assert equal(timeless(trainer) | shared_weights(here.server), timeless(other) | shared_weights(same.server))


def test_what_cannot_be_parked_does_not_go() -> None:
    here = world("llama", optimizer=ADAMW)
    trainer = client(here, (2, 4), ADAMW)

    class Full:
        def put(self, block: int, tensors: object) -> None:
            raise StorageError("the disk is full")

        def get(self, block: int) -> None:
            return None

    with pytest.raises(StorageError):
        recut(trainer, (1, 4), blocks_of(here), Full())
    assert model_of(trainer).cut == (2, 4)
    assert of_block(trainer, 1)


def test_moves_over_grpc_are_those_in_process(tmp_path: Path) -> None:
    states = []
    for over_network in (False, True):
        here = world("bert", optimizer=ADAMW, dropout=0.1)
        link = here.server.connect("a")
        with loopback(here.server, "a") if over_network else nullcontext(link) as way:
            trainer, parking = client(here, (1, 4), ADAMW, link=way), ParkedOnDisk(tmp_path / str(over_network), 1)
            for cut in ((2, 4), (1, 4), (3, 4), (2, 3)):
                trainer.step()
                recut(trainer, cut, blocks_of(here), parking)
            trainer.step()
            states.append(timeless(trainer) | shared_weights(here.server))
    assert equal(*states)


def test_a_client_goes_on_from_the_state_of_another_cut(tmp_path: Path) -> None:
    here = world("llama", optimizer=ADAMW)
    trainer = client(here, (3, 4), ADAMW)
    for _ in range(2):
        trainer.step()
    state, parking = {k: v.clone() for k, v in party_state(trainer).items()}, ParkedOnDisk(tmp_path, 1)
    assert cut_in(state) == (3, 4)
    shallower = client(here, (1, 3), ADAMW)
    new = move_party(shallower, state, parking)
    assert {model_of(trainer).stage.block_of(name) for name in new} == {3}  # the tail's: pulled from the server
    shared = shared_weights(here.server)
    assert all(torch.equal(shallower.model.personal_state()[name], shared[name]) for name in new)
    assert shallower.steps == 2
    again = client(here, (3, 4), ADAMW)
    move_party(again, party_state(shallower), parking)
    assert equal(of_block(again, 1) | of_block(again, 2), of_block(trainer, 1) | of_block(trainer, 2))
    fit(shallower, (3, 4), blocks_of(here))
    load_party(shallower, state)
    assert equal(timeless(shallower), timeless(trainer))


def test_a_server_gives_no_weights_of_blocks_that_only_it_holds() -> None:
    here = world("llama")
    link = model_of(client(here, (2, 3), ADAMW)).link
    assert link.call(FetchRequest(1)).result().weights
    assert link.call(FetchRequest(3)).result().weights
    with pytest.raises(LinkError, match="gives no shared blocks away"):
        link.call(FetchRequest(2)).result()


def test_what_is_parked_of_another_run_or_tuning_or_damaged_is_not_used(tmp_path: Path) -> None:
    here, lora = world("llama", optimizer=ADAMW), world("llama", tuning="lora", optimizer=ADAMW)
    other = client(lora, (2, 4), ADAMW)
    other.step()
    recut(other, (1, 4), blocks_of(lora), ParkedOnDisk(tmp_path, 1))
    trainer = client(here, (1, 4), ADAMW)
    done = recut(trainer, (2, 4), blocks_of(here), ParkedOnDisk(tmp_path, 1))  # the adapters of another tuning
    assert (done.came, done.restored) == ((1,), ())
    recut(trainer, (1, 4), blocks_of(here), ParkedOnDisk(tmp_path, 1))
    assert ParkedOnDisk(tmp_path, 1).get(1)
    assert ParkedOnDisk(tmp_path, 2).get(1) is None  # another run's
    file = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert ParkedOnDisk(tmp_path, 1).get(1) is None


def test_a_server_of_another_model_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("llama", optimizer=ADAMW)
    for value in here.server.shared.updater.parameters.values():
        value.data.mul_(2)  # or nothing would come: the client has what nobody has trained
    trainer = client(here, (1, 4), ADAMW)
    link = model_of(trainer).link
    call = link.call

    def odd(request: Any) -> Any:
        if not isinstance(request, FetchRequest):
            return call(request)
        reply = call(request).result()
        answer: Future[Any] = Future()
        answer.set_result(replace(reply, weights={name: value[:1] for name, value in reply.weights.items()}))
        return answer

    monkeypatch.setattr(link, "call", odd)
    before = timeless(trainer)
    with pytest.raises(ModelError, match="expected"):
        recut(trainer, (2, 4), blocks_of(here), ParkedInMemory())
    assert equal(timeless(trainer), before)
    assert here.server.cut_of("a") == (1, 4)


def test_a_step_that_comes_again_with_another_cut_is_computed_for_that_cut() -> None:
    """What was answered to the cut before would be the activation and the gradient of other blocks."""
    here, fresh = (world("llama", optimizer=SGD, remembers=True) for _ in range(2))
    trainer, plain = client(here, (2, 4), SGD), client(fresh, (1, 4), SGD)
    state = {k: v.clone() for k, v in party_state(trainer).items()}
    trainer.step()
    after = shared_weights(here.server)
    back = client(here, (1, 4), SGD, numbering=model_of(trainer).steps.numbering)
    move_party(back, state, ParkedInMemory())
    fresh.server.shared.load(copied(here.server.shared.state()))  # which have that step already
    again, wanted = back.step(), plain.step()
    assert (again.number, again.loss) == (1, wanted.loss)
    assert equal(shared_weights(here.server), after)  # not applied again
    assert here.server.shared.version == 1


def timeless(trainer: Trainer) -> dict[str, Tensor]:
    """All of a client's state that does not depend on clocks and on what was measured."""
    return {k: v.clone() for k, v in party_state(trainer).items() if not k.startswith(("meter/", "seconds"))}


def of_block(trainer: Trainer, block: int) -> dict[str, Tensor]:
    stage = model_of(trainer).stage
    own: dict[str, nn.Parameter] = {k: v for k, v in stage.trainable().items() if stage.block_of(k) == block}
    state = trainer.updater.state().items()
    return copied(own) | {k: v.clone() for k, v in state if k.partition("/")[2] in own}
