"""A head is taught before anything leaves, tells less then, and its run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexp.attacks.public import known_to_all
from flexp.client.guarding import Guard, distance_correlation
from flexp.config import PrivacyConfig, RunConfig
from flexp.errors import ConfigError, PrivacyError
from flexp.links.messages import ForwardRequest
from flexp.links.opening import loopback
from flexp.methods import World
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.parties import own_stage
from flexp.models.anatomy import Part
from flexp.run.settle import build_world, load_processor, model_folder
from tests import tiny
from tests.harness import seeded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("guarding")
    tiny.bert_folder(place / "model", dropout=True)
    (place / "public.txt").write_text("good bad fine poor and many other words that people use\n" * 4)
    return place


def config(folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    told = {"penalty": "nopeek", "public": str(folder / "public.txt"), "warm_up": {"steps": 3}} | (privacy or {})
    base: dict[str, Any] = {"data": {"clients": tiny.each(cut=[[2, 4]])}, "method": {"align": {"kind": "off"}}}
    if "model" in changes:
        changes["model"] = {"id": str(folder / "model"), **changes["model"]}
    return tiny.config(folder, **{"privacy": told, "train": {"rounds": 2, "steps_per_round": 2}, **base, **changes})


def test_distance_correlation_is_that_of_its_definition() -> None:
    left, right = torch.randn(7, 3, generator=seeded(0)), torch.randn(7, 5, generator=seeded(1))

    def centred(rows: Any) -> Any:
        far = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        return far - far.mean(0) - far.mean(1)[:, None] + far.mean()

    a, b = centred(left.double().numpy()), centred(right.double().numpy())
    expected = (a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())
    assert float(distance_correlation(left, right)) == pytest.approx(expected, rel=1e-3)
    turned = torch.linalg.qr(torch.randn(3, 3, generator=seeded(2))).Q
    assert float(distance_correlation(left, 3 * left @ turned + 1)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_a_taught_head_sends_depends_less_on_its_tokens(folder: Path, tuning: str) -> None:
    world = build_world(config(folder, model={"tuning": tuning}))
    tokenizer = load_processor(model_folder(world.config), world.config)
    examples = world.federation.clients[0].train
    stage = own_stage(world, Part.client((2, 4), world.source.anatomy.blocks))

    def dependence() -> float:
        known = known_to_all(stage, 2, examples)
        return float(distance_correlation(known.sent.z_NH, known.embeddings[known.ids_N]))

    before = dependence()
    told = PrivacyConfig.model_validate(
        {"penalty": "nopeek", "public": str(folder / "public.txt"),
         "warm_up": {"steps": 20, "weight": 10.0, "lr": 1e-2}}
    )  # fmt: skip
    Guard(told, examples, tokenizer, 0).teach(stage, 2)
    assert dependence() < 0.8 * before


@contextmanager
def seen(method: FlexpSfl) -> Iterator[list[Any]]:
    """What reaches the server inside the ``with`` block."""
    requests, inner = [], method.server.answer

    def answer(client: str, request: Any) -> Any:
        requests.append(request)
        return inner(client, request)

    vars(method.server)["answer"] = answer
    yield requests
    del vars(method.server)["answer"]


@pytest.mark.parametrize("train", [True, False])
def test_nothing_leaves_where_the_bound_is_not_met(folder: Path, train: bool) -> None:
    world = build_world(config(folder, {"max_content_words": 0.0, "warm_up": {"steps": 1}}))
    method = FlexpSfl(world)
    client = method.clients["north"]
    with seen(method) as requests, pytest.raises(PrivacyError, match=r"nothing was sent\. Cut deeper \(now s = 2\)"):
        client.step() if train else client.personal(world.federation.task.collate(client.data.test[:2]))
    assert not any(isinstance(request, ForwardRequest) for request in requests)


def test_the_first_activation_is_the_taught_head_s(folder: Path) -> None:
    world = build_world(config(folder))
    method = FlexpSfl(world)
    client = method.clients["north"]
    untaught = own_stage(world, Part.client((2, 4), world.source.anatomy.blocks))
    with seen(method) as requests:
        batch = world.federation.task.collate(client.data.test[:2])
        client.personal(batch)
    sent = next(request for request in requests if isinstance(request, ForwardRequest)).hidden_BTH
    untaught.model.eval()
    hidden_BTH, plan = untaught.plan({key: value for key, value in batch.items() if key != "labels"})
    assert not torch.allclose(untaught.run(hidden_BTH, plan, 0, 2), sent)


def test_the_penalty_trains_along_with_the_task(folder: Path) -> None:
    """Its gradient is added at z: with a large weight the head ends elsewhere, the tail's first step is the same."""
    ends = []
    for weight in (0.0, 5.0):
        trainer = FlexpSfl(build_world(config(folder, {"weight": weight, "warm_up": {"steps": 1}}))).clients["north"]
        trainer.step()
        ends.append(trainer.model.personal_state())
    differs = {name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])}
    assert any(".layer.0." in name for name in differs)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_resumed_run_is_an_undisturbed_one(folder: Path, steps: int) -> None:
    """Also where it was stopped before its head was taught."""
    world = build_world(config(folder))
    whole, before, after = FlexpSfl(world), FlexpSfl(world), FlexpSfl(world)
    for _ in range(steps):
        before.clients["north"].step()
    after.clients["north"].step()
    after.load(before.state())
    for _ in range(2):
        whole.clients["north"].step()
    for _ in range(2 - steps):
        after.clients["north"].step()
    expected, found = whole.state(), after.state()
    assert int(expected["client-north"]["taught"]) == 2
    for party, tensors in expected.items():
        for name, value in tensors.items():
            assert "seconds" in name or torch.equal(value, found[party][name]), (party, name)


class OverGrpc(FlexpSfl):
    """Its clients reach the server through a port of this machine."""

    name = "over-grpc"

    def connect(self, name: str) -> Any:
        self.ways = [*getattr(self, "ways", []), loopback(self.server, name)]
        return self.ways[-1].__enter__()


def test_over_grpc_it_is_the_same(folder: Path) -> None:
    def trained(kind: type[FlexpSfl], world: World) -> dict[str, torch.Tensor]:
        method = kind(world)
        for _ in range(2):
            method.clients["north"].step()
        found = method.trained_weights("north")
        for way in getattr(method, "ways", []):
            way.__exit__(None, None, None)
        return found

    world = build_world(config(folder, train={"rounds": 1, "steps_per_round": 2, "micro_batch": 2, "in_flight": 2}))
    near, far = trained(FlexpSfl, world), trained(OverGrpc, world)
    assert all(torch.equal(near[name], far[name]) for name in near)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": {"align": {"kind": "kl"}}, "model": {"base_depth": 1}}, "z_base of depth 1"),
        ({"method": {"align": {"kind": "weights"}}, "model": {"base_depth": 1}}, 'kind = "off"'),
        ({"method": {"name": "fedavg"}}, "heads stay on their clients"),
        ({"method": {"personal": {"frozen_head_blocks": 2}, "align": {"kind": "off"}}}, "nothing below the cut"),
        ({"recut": {"on": True}}, "choose one"),
        ({"privacy": {"penalty": "off", "max_content_words": 0.1}}, 'set privacy.penalty'),
    ],
)  # fmt: skip
def test_what_cannot_be_guarded_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    def step() -> None:
        FlexpSfl(build_world(config(folder, **changes))).clients["north"].step()

    with pytest.raises(ConfigError, match=says):
        step()
