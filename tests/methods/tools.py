"""Methods on tiny worlds: the tiny BERT of the runner's tests, and a quadratic whose every step can be done by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexp.client.meeting import FIRST, LAST
from flexp.config import RunConfig
from flexp.data.types import ClientData, Federation
from flexp.methods import METHODS, World, federated
from flexp.run.settle import build_world
from tests.tiny import CUTS, config, each

ADAPTERS = {"splitlora", "splitft", "hetlora", "fedsa-lora"}
"""Methods that need ``model.tuning = "lora"``."""

ONE = {"clients": {"names": ["north"], "each": [{"cut": [2, 3]}]}}


def make(home: Path, name: str, *, budget: str = "equal", **settings: Any) -> Any:
    """A method on the tiny BERT with dropout; ``settings`` are tables, of which ``own`` is the method's.

    ``absent`` are the clients that take no part, ``align`` and ``meet`` are those tables of the method, ``ranks`` are
    of the clients' adapters, in turn.
    """
    own, absent, ranks = settings.pop("own", {}), settings.pop("absent", ()), settings.pop("ranks", None)
    if ranks:
        settings["data"] = {"clients": each(cut=CUTS, rank=ranks)}
    table = _table(name, own, budget) | {key: settings.pop(key) for key in ("align", "meet") if key in settings}
    if name in ADAPTERS:
        settings["model"] = {"tuning": "lora", **settings.get("model", {})}
    world = build_world(config(home, method=table, **settings))
    return METHODS[name](replace(world, absent=frozenset(absent)))


def _table(name: str, own: dict[str, Any], budget: str) -> dict[str, Any]:
    table = "splitfed" if name.startswith("splitfed-") else name.replace("-", "_")
    return {"name": name, "budget": budget} | ({table: own} if own else {})


def trained(home: Path, name: str, *, rounds: int = 2, **settings: Any) -> Any:
    """A method after ``rounds`` rounds, with its steps in ``steps``."""
    train = settings.pop("train", {})
    method = make(home, name, train={"rounds": rounds, **train}, **settings)
    method.seen = []
    if method.world.meets.first:
        method.meet(FIRST)
    for number in range(1, rounds + 1):
        method.train_round(number, method.seen.append)
    if method.world.meets.last:
        method.meet(LAST)
    return method


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same names and the same numbers, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


class Quadratic(nn.Module):
    """f(θ) = ½ c (θ − a)², with c and a in the batch; ``bias`` is a second number, added to θ."""

    base_model_prefix = "base"

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ParameterDict({"theta": nn.Parameter(torch.zeros(1, dtype=torch.float64))})
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, c: Tensor, a: Tensor, labels: Tensor | None = None) -> Any:
        distance = self.base["theta"] + self.bias - a
        return SimpleNamespace(loss=(0.5 * c * distance**2).mean(), logits=distance)


class _Task:
    model_kind = "sequence-classification"

    def collate(self, examples: Any) -> dict[str, Tensor]:
        batch = {key: torch.tensor([example[key] for example in examples], dtype=torch.float64) for key in "ca"}
        return {**batch, "labels": torch.zeros(len(examples), dtype=torch.long)}


class _Stage:
    def __init__(self, bias: bool) -> None:
        self.model = Quadratic()
        self.model.bias.requires_grad_(bias)
        self.anatomy = SimpleNamespace(blocks=2, path="base")
        self.no_cache: dict[str, Any] = {}
        self.new: frozenset[str] = frozenset()
        self.computing = nullcontext

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def block_of(self, name: str) -> int | None:
        return 0 if name == "base.theta" else None

    def placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs

    # Split after block 0: θ is the client's, the bias the server's.

    def plan(self, inputs: dict[str, Tensor]) -> tuple[Tensor, None]:
        return torch.zeros(len(inputs["c"]), 1, 1, dtype=torch.float64), None

    def run(self, hidden_BTH: Tensor, plan: None, start: int, stop: int) -> Tensor:
        return hidden_BTH + self.model.base["theta"] if start == 0 else hidden_BTH

    def finish(self, hidden_BTH: Tensor, inputs: dict[str, Tensor], plan: None) -> Any:
        distance = hidden_BTH.flatten() + self.model.bias - inputs["a"]
        return SimpleNamespace(loss=(0.5 * inputs["c"] * distance**2).mean(), logits=distance)


def by_hand(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    own: dict[str, Any],
    clients: dict[str, list[tuple[float, float]]],
    *,
    steps: int,
    rounds: int = 1,
    lr: float = 0.1,
    bias: bool = False,
    budget: str = "equal",
) -> Any:
    """A method on quadratics after its rounds: a client is a list of (c, a), one number is trained, by plain SGD."""
    monkeypatch.setattr(federated, "own_stage", lambda world, part: _Stage(bias))
    settings = RunConfig.model_validate(
        {
            "model": {"id": "none", "tuning": "lora" if name in ADAPTERS else "full"},
            "data": {"source": "none"},
            "train": {
                "rounds": rounds,
                "steps_per_round": steps,
                "batch_size": 1,
                "personal": {"name": "sgd", "lr": lr, "clip": None},
                "shared": {"name": "sgd", "lr": lr, "clip": None},
            },
            "method": _table(name, own, budget),
        }
    )
    data = [ClientData(key, [{"c": c, "a": a} for c, a in rows], [], []) for key, rows in clients.items()]
    source: Any = SimpleNamespace(anatomy=SimpleNamespace(blocks=2))
    task: Any = _Task()
    method: Any = METHODS[name](World(settings, Federation(data, task), source, dict.fromkeys(clients, (1, 2))))
    for number in range(1, rounds + 1):
        method.train_round(number, lambda step: None)
    return method


def average(method: Any) -> float:
    """θ of the server."""
    return float(method.server.weights["base.theta"])


def own(method: Any, client: str) -> float:
    """θ of a client's personal model."""
    return float(method.personal_weights(method.clients[client])["base.theta"])
