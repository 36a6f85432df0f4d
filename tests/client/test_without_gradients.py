"""``privacy.gradients = false``: nothing that labels tell leaves a client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.audit import audit
from flexp.client.trainer import split_model_of
from flexp.config import DeploymentConfig, RunConfig
from flexp.errors import ConfigError
from flexp.links.base import Link
from flexp.links.messages import BackwardRequest, ForwardRequest, Ready
from flexp.links.opening import loopback
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.parties import own_trainer
from flexp.run.settle import build_world
from tests import tiny
from tests.harness import world
from tests.run.tools import Client, Server, plain

CUT = [2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("without")
    tiny.bert_folder(place / "model")
    tiny.bert_folder(place / "dropping", dropout=True)
    return place


def config(folder: Path, *, sends: bool = False, model: str = "model", **changes: Any) -> RunConfig:
    told = {
        "privacy": {"gradients": sends},
        "data": {"clients": tiny.each(cut=[CUT])},
        "method": {"align": {"kind": "off"}},
        "train": {"rounds": 1, "steps_per_round": 3},
    }
    return tiny.config(folder, **told | changes, model={"id": str(folder / model)})


def trained(method: FlexpSfl, steps: int = 3) -> dict[str, Tensor]:
    for _ in range(steps):
        for trainer in method.clients.values():
            trainer.step()
    return {
        f"{name}/{key}": value
        for name, trainer in method.clients.items()
        for key, value in trainer.model.personal_state().items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_it_is_training_with_everything_up_to_the_tail_frozen(folder: Path) -> None:
    """Bit for bit what a client does whose head and server are frozen and which sends gradients in vain; and a server
    that trains stays as it was."""
    world = build_world(config(folder))
    assert any("nothing that labels tell is sent" in note for note in world.federation.notes)
    begun = FlexpSfl(world)
    before = begun.server.shared.state()
    found = trained(begun)
    frozen = {"align": {"kind": "off"}, "personal": {"frozen_head_blocks": CUT[0]}}
    vain = FlexpSfl(build_world(config(folder, sends=True, method=frozen, server={"tuning": "frozen"})))
    assert same(found, trained(vain))
    assert not any(name.split("/")[1].startswith("bert.encoder.layer.1.") for name in found)
    assert any(".layer.3." in name for name in found)
    after = begun.server.shared.state()
    assert begun.server.shared.updater.parameters
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for record in begun.server.clients.values():
        assert record.progress.newest == 3


def test_with_dropout_the_server_s_blocks_draw_none(folder: Path) -> None:
    begun = FlexpSfl(build_world(config(folder, model="dropping")))
    answers: dict[tuple[int, ...], Tensor] = {}
    inner = begun.server.answer

    def answer(client: str, request: Any) -> Any:
        reply: Any = inner(client, request)
        if isinstance(request, ForwardRequest):
            assert request.step
            assert not request.train
            key = (int(request.hidden_BTH.double().sum() * 1e6),)
            answers.setdefault(key, reply.hidden_BTH)
            assert torch.equal(answers[key], reply.hidden_BTH)
        return reply

    vars(begun.server)["answer"] = answer
    trained(begun)
    assert answers


@pytest.mark.parametrize("train", [{}, {"micro_batch": 1}, {"micro_batch": 1, "in_flight": 2}], ids=str)
def test_what_the_server_sees_is_the_same_for_any_labels(folder: Path, train: dict[str, int]) -> None:
    seen: list[list[Any]] = []
    weights = []
    for flip in (False, True):
        method = FlexpSfl(build_world(config(folder, train={"rounds": 1, "steps_per_round": 3, **train})))
        asked: list[Any] = []
        inner = method.server.answer

        def answer(client: str, request: Any, asked: list[Any] = asked, inner: Any = inner) -> Any:
            asked.append((client, request))
            return inner(client, request)

        vars(method.server)["answer"] = answer
        for trainer in method.clients.values():
            for example in trainer.data.train if flip else ():
                example["labels"] = 1 - example["labels"]
        weights.append(trained(method))
        seen.append(asked)
    assert not same(*weights)
    assert len(seen[0]) == len(seen[1])
    for (client, one), (other, two) in zip(*seen, strict=True):
        assert client == other
        assert isinstance(one, ForwardRequest)
        for name in one.__dataclass_fields__:
            ours, theirs = getattr(one, name), getattr(two, name)
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, name


def test_over_a_network_and_after_a_fall_it_is_the_same(folder: Path) -> None:
    expected = trained(FlexpSfl(build_world(config(folder))))

    class OverGrpc(FlexpSfl):
        def connect(self, name: str) -> Link:
            opened = loopback(self.server, name)
            link = opened.__enter__()
            closing.append(opened)
            return link

    closing: list[Any] = []
    try:
        assert same(expected, trained(OverGrpc(build_world(config(folder)))))
    finally:
        for opened in closing:
            opened.__exit__(None, None, None)
    first, second = (FlexpSfl(build_world(config(folder))) for _ in range(2))
    trained(first, 1)
    second.load(first.state())
    assert same(expected, trained(second, 2))


def test_a_forward_without_a_backward_keeps_nothing(folder: Path) -> None:
    method = FlexpSfl(build_world(config(folder)))
    (name, trainer), *_ = method.clients.items()
    kept = []
    inner = method.server.answer

    def answer(client: str, request: Any) -> Any:
        assert not isinstance(request, BackwardRequest)
        reply = inner(client, request)
        session = method.server._sessions[client]
        kept.append((session.kept_bytes, len(session.pending)))
        return reply

    vars(method.server)["answer"] = answer
    trainer.step()
    assert kept == [(0, 0)]
    assert method.server._sessions[name].shared.version == 0
    half = split_model_of(trainer).link.meter.training
    whole = FlexpSfl(build_world(config(folder, sends=True))).clients[name]
    whole.step()
    assert half.bytes_up < 0.6 * split_model_of(whole).link.meter.training.bytes_up


def test_an_audit_attacks_labels_by_activations_alone(folder: Path, tmp_path: Path) -> None:
    public = tmp_path / "public.txt"
    public.write_text("good bad fine poor and many other words that people use\n" * 4)
    found = audit(FlexpSfl(build_world(config(folder))), public=public)
    assert not found.by_gradients
    assert {"features", "majority"} <= found.labels.keys()
    assert "by activations" in found.line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"align": {"kind": "kl"}}}, "nothing is aligned"),
        ({"privacy": {"gradients": False, "penalty": "nopeek"}}, "leave privacy.penalty out"),
        ({"privacy": {"gradients": False, "label_epsilon": 1.0}}, "leave privacy.label_epsilon out"),
        ({"method": {"name": "fedavg"}}, "heads stay on their clients"),
        ({"method": {"align": {"kind": "off"}, "meet": {"on": True, "masked": False}}}, "class sums without masks"),
        ({"train": {"early_stopping": {"patience": 1}}, "data": {"validation_fraction": 0.2}}, "stops early"),
        ({"data": {"clients": {"cut": "auto"}}}, "name the cuts"),
    ],
    ids=["aligned", "penalty", "epsilon", "method", "sums", "stopping", "planned"],
)
def test_what_does_not_go_with_it_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(folder, **changes)


@pytest.mark.parametrize("schedule", ["free", "deterministic"])
def test_a_server_that_conducts_is_told_no_losses_and_saves_all_the_same(
    folder: Path, tmp_path: Path, schedule: Any
) -> None:
    """Out of a step's loss and the texts all of its labels could be computed. Steps are counted as any others."""
    told = config(folder, train={"rounds": 2, "steps_per_round": 6, "batch_size": 4})
    deployment = DeploymentConfig(schedule=schedule, clients=list(tiny.CLIENTS), save_every=2)
    server = Server(told, deployment, tmp_path / "server")
    readies: list[Ready] = []
    answers: list[int] = []
    ready = server.conductor.ready

    def hear(client: str, said: Ready) -> Any:
        readies.append(said)
        answers.append(sum(len(record.progress._answers) for record in server.server.clients.values()))
        return ready(client, said)

    vars(server.conductor)["ready"] = hear
    clients = [Client(told, deployment, name, plain(server), tmp_path / "clients" / name) for name in tiny.CLIENTS]
    for client in clients:
        client.join()
    server.end()
    assert {"lr", "seconds"} <= set().union(*(said.facts for said in readies))
    assert not any({"loss", "score", "ended"} & said.facts.keys() for said in readies)
    assert any(0 < said.saved < 12 for said in readies if said.saved is not None)
    assert set(answers) == {0}


def test_a_batch_of_a_step_that_was_given_up_gets_no_other_batch_s_answer(folder: Path) -> None:
    method = FlexpSfl(build_world(config(folder)))
    method.server.remembers = True
    trainer = next(iter(method.clients.values()))
    model = split_model_of(trainer)
    (piece, batch), *_ = trainer.pieces()
    other = {key: value.flip(0) if key == "input_ids" else value for key, value in batch.items()}

    def fail() -> None:
        with model.part_of_step(piece):
            model(**other)
            raise RuntimeError("given up")

    with pytest.raises(RuntimeError, match="given up"):
        fail()
    with model.part_of_step(piece):
        found = model(**batch).logits
    fresh = FlexpSfl(build_world(config(folder)))
    again = split_model_of(next(iter(fresh.clients.values())))
    again.train(True)
    with again.part_of_step(piece):
        assert torch.equal(again(**batch).logits, found)


@pytest.mark.parametrize("model", [{"tuning": "lora"}, {"gradient_checkpointing": True}], ids=str)
def test_adapters_and_recomputation_below_the_cut_stay_out_of_it(folder: Path, model: dict[str, Any]) -> None:
    told = config(folder)
    told = told.model_copy(update={"model": told.model.model_copy(update=model)})
    method = FlexpSfl(build_world(told))
    before = {
        name: value.clone() for name, value in split_model_of(method.clients["north"]).stage.model.named_parameters()
    }
    found = trained(method)
    after = dict(split_model_of(method.clients["north"]).stage.model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert not any(f".layer.{block}." in name for name in changed for block in range(CUT[0]))
    assert found


def test_a_tail_of_nothing_is_refused(folder: Path) -> None:
    """As of a language model with adapters, cut at e = L."""
    world = build_world(config(folder))
    stage: Any = SimpleNamespace(trainable=dict)
    with pytest.raises(ConfigError, match="leaves nothing to train, since its tail has no blocks"):
        own_trainer(world.config, world.federation.clients[0], world.federation.task, stage, stage)


def test_accumulated_exchanges_of_a_loop_of_one_s_own_are_no_half_step(folder: Path) -> None:
    method = FlexpSfl(build_world(config(folder)))
    trainer = next(iter(method.clients.values()))
    model, (_, batch) = split_model_of(trainer), trainer.pieces()[0]
    model.train()
    model.steps.accumulation = 2
    sum(model(**batch).loss for _ in range(2)).backward()
    assert model.steps.done == 1


def test_which_rows_are_read_tells_no_labels(tmp_path: Path) -> None:
    """Of a language model: with ``link.rows = "loss"`` else those that have a label."""
    here = world("llama")
    model = here.client("a", (1, 4))
    model.rows, model.gradients = "loss", False
    for name, value in model.stage.trainable().items():
        value.requires_grad_(not model.stage.within(name, 0, 1))
    batch = here.batch()
    half = {**batch, "labels": batch["labels"].clone()}
    half["labels"][:, :5] = -100
    seen = []
    inner = here.server.answer

    def answer(client: str, request: Any) -> Any:
        seen.append(request)
        return inner(client, request)

    vars(here.server)["answer"] = answer
    losses = [model(**each).loss.item() for each in (batch, half)]
    assert losses[0] != losses[1]
    assert [one.rows_BT for one in seen] == [None, None]
