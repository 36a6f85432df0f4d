"""Adapters of each client's own on the shared blocks: as if every client had a server to itself, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.config import AlignConfig, GuardConfig, OptimizerConfig, ServerConfig
from flexp.errors import ConfigError
from flexp.links.asking import FetchRequest, PullRequest
from flexp.optim import Updater
from flexp.rng import RandomStream
from tests.harness import World, copied, equal, world

ADAM = OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.1, schedule="linear", warmup_steps=1)
OWN = ServerConfig(adapters="own")
CUTS = {"a": (1, 4), "b/c": (3, 4)}


class Run:
    """Clients that take steps in turn at one server with dropout."""

    def __init__(self, *names: str, config: ServerConfig = OWN) -> None:
        self.here: World = world(tuning="lora", optimizer=ADAM, config=config, dropout=0.2, total_steps=6, seed=5)
        self.models = {
            name: self.here.client(name, CUTS[name], AlignConfig(kind="weights", pull=0.3, teach=True), base_depth=1)
            for name in names
        }
        self.updaters = {name: Updater(model.stage.trainable(), ADAM) for name, model in self.models.items()}
        self.random = {name: RandomStream(len(name)) for name in names}
        self.losses: dict[str, list[float]] = {name: [] for name in names}

    def steps(self, first: int, last: int) -> Run:
        for step in range(first, last):
            for name, model in self.models.items():
                with self.random[name].active():
                    loss = model(**self.here.batch(seed=10 * step + len(name), padding="right")).loss
                    loss.backward()
                self.updaters[name].step()
                model.after_step()
                self.losses[name].append(loss.item())
        return self

    def of(self, name: str) -> dict[str, Tensor]:
        """All that belongs to a client, here and on the server."""
        blocks = self.here.server.own.get(name) or self.here.server.shared
        return copied(blocks.state()) | copied(self.models[name].personal_state())


def test_each_is_as_if_alone() -> None:
    both = Run(*CUTS).steps(0, 4)
    for name in CUTS:
        alone = Run(name, config=ServerConfig()).steps(0, 4)
        assert both.losses[name] == alone.losses[name]
        assert equal(both.of(name), alone.of(name))
    server = both.here.server
    assert (server.updates, server.shared.version, server.counts()["updates"]) == (8, 0, 8)
    other = Run(*CUTS).here.server
    other.load(copied(server.state()))
    assert equal(copied(other.own["b/c"].state()), copied(server.own["b/c"].state()))
    start = world(tuning="lora").server.shared.updater.parameters
    assert equal(copied(server.shared.updater.parameters), copied(start))


def test_what_a_client_is_given_is_its_own() -> None:
    run = Run(*CUTS).steps(0, 2)
    server = run.here.server
    server.allow_export = True
    found: list[dict[str, Tensor]] = []
    for name in CUTS:
        reply: Any = server.answer(name, FetchRequest(3))
        own = server.own[name].updater.parameters
        assert reply.weights
        assert all(torch.equal(value, own[key]) for key, value in reply.weights.items())
        found.append(reply.weights)
    assert not equal(*found)
    pulled: Any = server.answer("b/c", PullRequest(1, 3, 9))
    assert all(torch.equal(value, server.own["b/c"].updater.parameters[key]) for key, value in pulled.weights.items())


def test_what_it_is_not_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tuning is 'full'; set model.tuning or server.tuning"):
        world(config=OWN)
    with pytest.raises(ValueError, match="looks at other clients' norms"):
        ServerConfig(adapters="own", guard=GuardConfig(clip="median"))
    with pytest.raises(ValueError, match='update = "mean" takes several clients'):
        ServerConfig(adapters="own", update="mean")
