"""Several servers that average their weights, in the place of one: does a client's model suffer?

    python experiments/replicas.py CONFIG.toml --replicas 2 --every 8 --out DIR [--set key=value ...]

The clients are shared out among the servers in turn. After every ``--every`` steps of clients, counted over all, the
servers' trained weights become their mean; each keeps its optimiser. One server (``--replicas 1``) is ``flexp run``.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path

import torch

from flexp.config.loading import load
from flexp.links.base import Link
from flexp.methods.base import OnStep
from flexp.methods.flexp_sfl import FlexpSfl
from flexp.methods.turns import turns
from flexp.run.runner import train
from flexp.run.settle import build_world
from flexp.server import Server


class Replicas(FlexpSfl):
    """FlexP-SFL with ``count`` servers that average every ``every`` steps; :attr:`server` is the first."""

    count, every, done = 1, 1, 0

    @cached_property
    def servers(self) -> list[Server]:
        """Each with a schedule as long as its share of the steps."""
        made = [self.server, *(self._make_server() for _ in range(self.count - 1))]
        for server in made:
            total = server.shared.updater.total_steps
            server.shared.updater.total_steps = None if total is None else -(-total // self.count)
        return made

    def connect(self, name: str) -> Link:
        number = [data.name for data in self.world.federation.clients].index(name)
        return self.servers[number % self.count].connect(name)

    def train_round(self, number: int, on_step: OnStep) -> None:
        for name in turns(self.world.participant_names, self.world.config.train, self.world.config.seed, number):
            on_step(self.clients[name].step())
            self.done += 1
            if self.done % self.every == 0:
                self.average()
        self.average()  # so that every round is scored, and ends, with one model

    def average(self) -> None:
        """Give all servers the mean of their weights."""
        every = [server.shared for server in self.servers]
        names = every[0].updater.parameters
        with torch.no_grad():
            means = {name: torch.stack([each.updater.parameters[name] for each in every]).mean(0) for name in names}
        for each in every:
            each.load_weights(means)


def main() -> None:
    """Train, and say how well the clients do."""
    said = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    said.add_argument("config", type=Path)
    said.add_argument("--replicas", type=int, default=2)
    said.add_argument("--every", type=int, default=8)
    said.add_argument("--out", type=Path, required=True)
    said.add_argument("--set", action="append", default=[])
    options = said.parse_args()
    Replicas.count, Replicas.every = options.replicas, options.every
    world = build_world(load(options.config, options.set))
    summary = train(world, Replicas(world), options.out)
    print(options.replicas, options.every, summary["scores"]["last"])


if __name__ == "__main__":
    main()
