"""What the exchanges of a run's clients cost: their stages and servers, given to :mod:`flexp.cost.flops`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from flexp.cost.flops import ExchangeCost, count_exchange, mean_shape
from flexp.cost.probe import Probe
from flexp.methods.base import World, base_depth
from flexp.methods.parties import client_seed, own_stage, own_world, with_model
from flexp.models.parts import Part
from flexp.models.stage import carve
from flexp.models.tuning import tune
from flexp.server import Server


class Costs:
    """Counts once for each distinct cut, rank and batch shape of a run's clients."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.part = world.method.held.part
        self._known: dict[Any, ExchangeCost] = {}

    def of(self, client: str, only: Collection[str] | None = None) -> ExchangeCost:
        """An exchange of ``client`` at its mean shape; ``only``: of a whole model of which just these weights train."""
        world = own_world(self.world, client) if self.part == "ends" else self.world
        examples, length, exchanges = self.shape(client)
        cut = None if self.part == "whole" else self.world.cuts[client]
        own = self.world.adapters(client)
        again = world.config.model.gradient_checkpointing
        key = (cut, examples, length, own.lora.rank, again, None if only is None else frozenset(only))
        if key not in self._known:
            aligned = world.method.aligns
            probe = Probe(
                model="",
                kind=self.world.federation.task.model_kind,
                cut=cut,
                examples=examples,
                length=length,
                labels=None,
                model_config={"tuning": self.world.config.model.tuning},
                optimizer={},
                align=world.config.method.align.model_dump(mode="json") if aligned else None,
                base_depth=base_depth(world.config, world.cuts) if aligned else None,
                tail=self.part != "start",
                ranks=tuple(own.beside.items()),
            )
            self._known[key] = self._count(with_model(world, lora=own.lora), probe, only)
        return replace(self._known[key], exchanges=exchanges)

    def shape(self, client: str) -> tuple[int, int, int]:
        """Examples and tokens of the mean exchange of ``client``, and exchanges in a step."""
        config = (own_world(self.world, client) if self.part == "ends" else self.world).config
        train = next(data.train for data in self.world.federation.clients if data.name == client)
        lengths = [len(example.get("input_ids", (0,))) for example in train]
        return mean_shape(config.train, lengths, client_seed(config.seed, client))

    def _count(self, world: World, probe: Probe, only: Collection[str] | None) -> ExchangeCost:
        blocks = world.source.anatomy.blocks
        if probe.cut is None or not probe.tail:
            return count_exchange(probe, own_stage(world, Part.whole(blocks)), only=only)
        base = probe.cut[0] if probe.base_depth is None else probe.base_depth
        stage = own_stage(world, Part.client(probe.cut, blocks), dict(probe.ranks))
        return count_exchange(probe, stage, _server(world, (base, probe.cut[1])))


def _server(world: World, blocks: tuple[int, int]) -> Server:
    config = world.config
    stage = carve(world.source, Part.server(*blocks))
    tuning = config.server.tuning or config.model.tuning
    tune(stage, config.model, tuning, seed=config.seed)
    return Server(stage, tuning=tuning, config=config.server, optimizer=config.train.shared)
