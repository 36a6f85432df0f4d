"""What one client of four that does not mean well takes from the others, and what each rule of the server gives back.

It is honest in everything but its gradients: it sends ∂task/∂h backwards, ten times as large. After honest training it
does 20 steps alone, or ten for each of the others' for as long as these train on. What is scored are the honest
clients' personal models on their own test data.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from benchmarks.tools.command import Data, Encoder, Examples, Length, Result, Steps, Tests, Threads, fetched, say
from flexp.config import RunConfig
from flexp.data.scores import evaluate
from flexp.links.base import Link
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest
from flexp.links.wrapping import Wrapping
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.models.loading import load_config
from flexp.run.settle import build_world
from flexp.server.rules import Quota

ALONE, ROUNDS, GREED = 20, 8, 10
HARM = -10.0
RULES: dict[str, tuple[dict[str, Any], tuple[float, int] | None]] = {
    "none": ({}, None),
    "quota 2 + 8": ({}, (2.0, 8)),
    "quota 1 + 8": ({}, (1.0, 8)),
    "clip = median": ({"guard": {"clip": "median"}}, None),
    "mean of 4": ({"update": "mean", "mean_over": 4}, None),
    "trimmed, 1 of 4": ({"update": "trimmed", "mean_over": 4}, None),
    "similar = 0": ({"guard": {"similar": 0.0}}, None),
    "quota 1 + 8, similar = 0": ({"guard": {"similar": 0.0}}, (1.0, 8)),
}
"""Tables ``[server]``, and ``deployment.quota`` with ``quota_ahead``."""


class Harmful(Wrapping):
    """Sends gradients that undo what the others do."""

    def __init__(self, inner: Link) -> None:
        super().__init__(inner)
        self.harms = False

    def call(self, request: Request[Any]) -> Future[Any]:
        if self.harms and isinstance(request, BackwardRequest):
            request = replace(request, grad_BTH=request.grad_BTH * HARM)
        return self.inner.call(request)


class Four(FlexpSfl):
    """The last client's link is in its own hands."""

    def connect(self, name: str) -> Link:
        link = super().connect(name)
        if name != list(self.world.cuts)[-1]:
            return link
        self.harmful = Harmful(link)
        return self.harmful


def measure(
    model: Encoder = "asset:minilm-l6",
    data: Data = "asset:sentiment",
    steps: Steps = 24,
    batch_size: Examples = 8,
    max_length: Length = 32,
    test_examples: Tests = 96,
    threads: Threads = 1,
) -> Result:
    """What a client that poisons takes from three honest ones, with each rule of the server."""
    folder = fetched(model, threads)
    found: list[dict[str, Any]] = []
    for name, (server, quota) in RULES.items():
        scores = _played(folder, data, steps, batch_size, max_length, test_examples, server, quota)
        found.append({"rule": name, **scores})
        say(f"{name}: {scores}")
    shown = [
        [str(row["rule"]), *(f"{100 * row[key]:.1f}" for key in ("trained", "alone", "greedy")), f"{row['skipped']}"]
        for row in found
    ]
    columns = ("rule", "honest training", f"then {ALONE} steps alone", f"{GREED} for 1", "steps not applied")
    return Result({"rules": found}, shown, columns)


def _played(
    folder: str,
    data: str,
    steps: int,
    batch: int,
    length: int,
    tests: int,
    server: dict[str, Any],
    quota: tuple[float, int] | None,
) -> dict[str, Any]:
    config = _config(folder, data, steps, batch, length, tests, server)
    scores: dict[str, Any] = {"skipped": 0}
    for attack in ("alone", "greedy"):
        torch.manual_seed(0)
        method = Four(build_world(config))
        *honest, bad = method.clients
        if quota is not None:
            ratio, ahead = quota
            method.server.shared.quota = Quota(ratio, ahead, None, lambda _: None)
        for _ in range(steps):
            for name in honest:
                method.clients[name].step()
        scores["trained"] = _score(method, honest)
        method.harmful.harms = True
        if attack == "alone":
            _repeat(ALONE, method.clients[bad].step)
        else:
            for _ in range(ROUNDS):
                for name in honest:
                    method.clients[name].step()
                _repeat(GREED, method.clients[bad].step)
        scores[attack] = _score(method, honest)
        scores["skipped"] += method.server.shared.skipped[bad]
        method.close()
    return scores


def _score(method: Four, names: list[str]) -> float:
    task = method.world.federation.task
    clients = [method.clients[name] for name in names]
    return float(mean(evaluate(one.personal, task, one.data.test, 32)[task.metric] for one in clients))


def _repeat(times: int, action: Callable[[], Any]) -> None:
    for _ in range(times):
        action()


def _config(
    folder: str, data: str, steps: int, batch: int, length: int, tests: int, server: dict[str, Any]
) -> RunConfig:
    blocks = load_config(folder).num_hidden_layers
    optimizer = {"lr": 3e-4, "new_lr": 1e-3}
    return RunConfig.model_validate({
        "model": {"id": folder},
        "data": {
            "source": data,
            "max_length": length,
            "train_examples": steps * batch,
            "test_examples": tests,
            "clients": {"by": "iid", "count": 4, "cut": [1, blocks - 1]},
        },
        "train": {
            "rounds": 1,
            "steps_per_round": steps + ROUNDS * GREED,
            "batch_size": batch,
            "personal": optimizer,
            "shared": {"lr": 3e-4},
        },
        "method": {"align": {"kind": "off"}},
        "server": server,
        "evaluation": {"measure_memory": False},
    })  # fmt: skip
