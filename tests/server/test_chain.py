"""One, two and three servers train the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from flexp.client.exchange import Piece
from flexp.client.model import SplitModel
from flexp.config import AlignConfig, GuardConfig, OptimizerConfig, ServerConfig
from flexp.errors import BadValuesError, LinkError
from flexp.links.base import Link
from flexp.links.messages import BackwardRequest, ForwardRequest
from flexp.optim import Updater
from flexp.rng import RandomStream
from flexp.server import Server
from flexp.server.chain import Chain, Following
from tests.harness import World, copied, equal, world

ADAM = OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.1, schedule="linear", warmup_steps=1, clip=0.05)
SGD = OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, clip=0.1)
BORDERS = {1: (1, 4), 2: (1, 2, 4), 3: (1, 2, 3, 4)}


def chained(name: str = "bert", count: int = 2, **options: Any) -> tuple[World, list[Server]]:
    """So many servers, the last one first made; and the world of the first."""
    places = BORDERS[count]
    worlds = [world(name, base_depth=s, end=e, **options) for s, e in zip(places, places[1:], strict=False)]
    drawn = world(name, **options).server.shared.updater.parameters
    for one in worlds:
        one.server.shared.load_weights({key: drawn[key] for key in one.server.shared.updater.parameters})
    for here, after in zip(worlds[-2::-1], worlds[:0:-1], strict=True):
        after.server.following = Following({})
        lead(here, after.server.connect)
    return worlds[0], [one.server for one in worlds]


def lead(here: World, reach: Any) -> None:
    from flexp.links.messages import Join

    border = here.server.blocks[1]
    here.server.chain = Chain(reach, Join(**here.card("chain", (border, 4))), {}, "")


def weights(servers: list[Server]) -> dict[str, Tensor]:
    """Of all servers: weights, optimisers, what rules have gathered."""
    found: dict[str, Tensor] = {}
    for server in servers:
        found |= copied(server.shared.state())
    return found


class Federation:
    """Clients in turns, each with dropout, a tail and an optimiser of its own."""

    def __init__(self, name: str, count: int, cuts: Mapping[str, tuple[int, int]], kind: str = "off", **options: Any):
        self.here, self.servers = chained(name, count, total_steps=16, seed=5, dropout=0.2, **options)
        self.clients: dict[str, tuple[SplitModel, Updater, RandomStream]] = {}
        for seed, (client, cut) in enumerate(cuts.items()):
            align = AlignConfig(kind=kind, weight=0.3, pull=0.3) if cut[0] <= 2 else AlignConfig(kind="off")  # type: ignore[arg-type]
            model = self.here.client(client, cut, align)
            self.clients[client] = (model, Updater(model.stage.trainable(), ADAM, 8), RandomStream(seed))
        self.losses: list[float] = []

    def steps(self, count: int, pieces: int = 1) -> None:
        for step in range(count):
            for client, (model, updater, random) in self.clients.items():
                for piece in range(1, pieces + 1):
                    batch = self.here.batch(seed=7 * step + piece + len(client), padding="right")
                    with random.active(), model.part_of_step(Piece(piece, pieces, 1 / pieces, 1 / pieces)):
                        loss = model(**batch).loss
                        loss.backward()
                    self.losses.append(loss.item())
                updater.step()
                model.after_step()
        self.servers[0].flush()

    def everything(self) -> dict[str, Tensor]:
        flat = weights(self.servers)
        for client, (model, updater, _) in self.clients.items():
            flat |= {f"{client}/{key}": value for key, value in copied(model.personal_state()).items()}
            flat |= {f"{client}-optimizer/{key}": value for key, value in copied(updater.state()).items()}
        return flat


CUTS = {"a": (1, 4), "bb": (2, 4), "ccc": (1, 2), "dddd": (3, 4)}


@pytest.mark.parametrize(
    ("name", "kind", "tuning", "pieces", "config", "optimizer"),
    [
        ("bert", "kl", "full", 1, ServerConfig(), ADAM),
        ("bert", "off", "lora", 2, ServerConfig(guard=GuardConfig(clip=0.05)), SGD),
        ("gpt2", "weights", "full", 2, ServerConfig(update="mean", mean_over=3, memory="recompute"), ADAM),
        ("llama", "mse", "lora", 1, ServerConfig(update="trimmed", mean_over=3, guard=GuardConfig(clip=0.02)), SGD),
    ],
)
def test_one_two_and_three_servers_end_with_the_same_bits(
    name: str, kind: str, tuning: str, pieces: int, config: ServerConfig, optimizer: OptimizerConfig
) -> None:
    """Clipping bites: their thresholds are far below the norms."""
    ends, losses = [], []
    for count in (1, 2, 3):
        made = Federation(name, count, CUTS, kind, tuning=tuning, config=config, optimizer=optimizer)
        made.steps(3, pieces)
        ends.append(made.everything())
        losses.append(made.losses)
    assert losses[0] == losses[1] == losses[2]
    assert ends[0].keys() == ends[1].keys() == ends[2].keys()
    for end in ends[1:]:
        assert [name for name, value in end.items() if not torch.equal(value, ends[0][name])] == []
