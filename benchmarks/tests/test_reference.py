"""Every method against the benchmark's algorithm, written out as plain loops: equal weights, on equal batches.

What a run of thousands of rounds reaches cannot be tested here; that each round does what the benchmark's does, can.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pfl import make_method, settings
from benchmarks.tools.pictures import divide, federation, read_pictures, small_cnn
from flexp.client.trainer import BatchOrder
from flexp.config import RunConfig
from flexp.data.types import Batch, ClientData
from flexp.methods import World
from flexp.methods.parties import client_seed

from .tools import picture_folder

Weights = dict[str, Tensor]
ROUNDS = 2
LR, LAM, ETA, DECAY, INNER = 0.05, 1.0, 0.2, 0.1, 2
"""Larger than the benchmark's, so that every term moves the weights by far more than rounding does."""

OWN = {"ditto": {"lam": LAM}, "pfedme": {"lam": LAM, "eta": ETA, "inner_steps": INNER}}


@pytest.fixture
def world(tmp_path: Path) -> Any:
    pictures = read_pictures(str(picture_folder(tmp_path / "pictures", 60, 20)))
    data = federation(pictures, divide(pictures.labels, 3, "dirichlet"))

    def make(name: str) -> World:
        content = settings(name, ROUNDS, 0).resolved()
        content["train"]["personal"] |= {"lr": LR, "weight_decay": DECAY if name == "pfedme" else 0.0}
        content["method"].get(name, {}).update(OWN.get(name, {}))
        return World(RunConfig.model_validate(content), data, small_cnn(0), {})

    return make


class Plain:
    """The network, its gradients, and every client's epochs one after the other."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.model = copy.deepcopy(world.source.model).requires_grad_(True)
        self.start = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.head = {"classifier.weight", "classifier.bias"}
        self.epochs: dict[str, int] = {}

    def epoch(self, client: ClientData, stream: str = "") -> Iterator[Batch]:
        number = self.epochs.get(client.name + stream, 0)
        self.epochs[client.name + stream] = number + 1
        order = BatchOrder(len(client.train), 10, client_seed(0, client.name))
        for step in range(order.steps_per_epoch):
            rows = order.indices(number * order.steps_per_epoch + step)
            yield self.world.federation.task.collate([client.train[row] for row in rows])

    def gradient(self, weights: Weights, batch: Batch) -> Weights:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(self.model(**batch).loss, parameters), strict=True))

    def sgd(self, weights: Weights, batch: Batch, only: set[str] | None = None) -> Weights:
        found = self.gradient(weights, batch)
        return {n: w - LR * found[n] if only is None or n in only else w for n, w in weights.items()}

    def mean(self, sent: list[Weights]) -> Weights:
        sizes = [len(client.train) for client in self.world.federation.clients]
        return {n: sum(w[n] * size for w, size in zip(sent, sizes, strict=True)) / sum(sizes) for n in sent[0]}


def fedavg(plain: Plain) -> tuple[Weights, dict[str, Weights]]:
    average = plain.start
    for _ in range(ROUNDS):
        sent = []
        for client in plain.world.federation.clients:
            own = average
            for batch in plain.epoch(client):
                own = plain.sgd(own, batch)
            sent.append(own)
        average = plain.mean(sent)
    return average, {client.name: average for client in plain.world.federation.clients}


def fedrep(plain: Plain, together: bool = False) -> tuple[Weights, dict[str, Weights]]:
    body = plain.start.keys() - plain.head
    kept = {client.name: plain.start for client in plain.world.federation.clients}
    average = plain.start
    for _ in range(ROUNDS):
        sent = []
        for client in plain.world.federation.clients:
            own = {name: (average if name in body else kept[client.name])[name] for name in plain.start}
            for part in [None] if together else [plain.head, set(body)]:
                for batch in plain.epoch(client):
                    own = plain.sgd(own, batch, part)
            kept[client.name] = own
            sent.append(own)
        average = plain.mean(sent)
    personal = {
        name: {key: (average if key in body else own)[key] for key in plain.start} for name, own in kept.items()
    }
    return {name: average[name] for name in body}, personal


def fedper(plain: Plain) -> tuple[Weights, dict[str, Weights]]:
    return fedrep(plain, together=True)


def ditto(plain: Plain) -> tuple[Weights, dict[str, Weights]]:
    personal = {client.name: plain.start for client in plain.world.federation.clients}
    average = plain.start
    for _ in range(ROUNDS):
        sent = []
        for client in plain.world.federation.clients:
            v = personal[client.name]
            for batch in plain.epoch(client, "personal"):
                found = plain.gradient(v, batch)
                v = {n: v[n] - LR * (found[n] + LAM * (v[n] - average[n])) for n in v}
            personal[client.name] = v
            own = average
            for batch in plain.epoch(client):
                own = plain.sgd(own, batch)
            sent.append(own)
        average = plain.mean(sent)
    return average, personal


def pfedme(plain: Plain) -> tuple[Weights, dict[str, Weights]]:
    personal: dict[str, Weights] = {}
    average = plain.start
    for _ in range(ROUNDS):
        sent = []
        for client in plain.world.federation.clients:
            theta = own = average
            for batch in plain.epoch(client):
                for _ in range(INNER):
                    g = plain.gradient(theta, batch)
                    theta = {n: theta[n] - LR * (g[n] + LAM * (theta[n] - own[n]) + DECAY * theta[n]) for n in theta}
                own = {n: own[n] - LAM * ETA * (own[n] - theta[n]) for n in own}
            personal[client.name] = theta
            sent.append(own)
        average = plain.mean(sent)
    return average, personal


@pytest.mark.parametrize("reference", [fedavg, fedper, fedrep, ditto, pfedme])
def test_two_rounds_give_the_weights_of_the_benchmarks_algorithm(world: Any, reference: Any) -> None:
    made = world(reference.__name__)
    method: Any = make_method(made)
    for number in range(1, ROUNDS + 1):
        method.train_round(number, lambda step: None)
    average, personal = reference(Plain(made))
    assert method.server.weights.keys() == average.keys()
    assert far(average, dict(made.source.model.named_parameters())) > 5e-3
    assert far(method.server.weights, average) < 5e-6
    for client, weights in personal.items():
        if reference in (ditto, pfedme):
            assert far(weights, average) > 1e-2
        assert far(method.personal_weights(method.clients[client]), weights) < 5e-6


def far(left: Weights, right: Weights) -> float:
    """The largest difference of the numbers that both have."""
    return max(float((left[name] - right[name]).abs().max()) for name in left.keys() & right.keys())
