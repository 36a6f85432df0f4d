"""SplitFed v1: parallel split learning with averaging on both sides (Thapa et al., AAAI 2022, arXiv 2004.12088).

L-shaped: clients have embeddings and blocks [0, s), the server has the rest, the head and the labels
(:mod:`flexp.methods.two_sided`; s is ``method.splitfed.cut``). In a round the server keeps one copy of its side for
each client; every client and its copy take ``train.steps_per_round`` steps as one model, in parallel; then

    client's side ← Σ n_k/n · client's side_k,        server's side ← Σ n_k/n · server's side_k

Both sides begin a round with fresh optimisers. With clipping off and equal optimisers on the two sides it is FedAvg,
bit for bit; with one client and one round it is local training. The personal model of every client is the average.
Budget: exact. Bytes: activations, masks and labels up, gradients down; the client's side both ways every round.
"""

from __future__ import annotations

from flexp.methods.base import OnStep, World
from flexp.methods.federated import Client
from flexp.methods.two_sided import TwoSided
from flexp.methods.workbench import Weights


class SplitFedV1(TwoSided):
    """SplitFed: both sides of a split that has the labels on the server are averaged (Thapa et al., 2022)."""

    name = "splitfed-v1"
    table = "splitfed"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.copies = len(world.participants)

    def is_shared(self, name: str) -> bool:
        return True

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        self.bench.put(received)
        server = self.server_updater(self.bench.server_side, self.world.total_steps)
        server.steps = client.workers["model"].steps
        self.split_steps(client, server, on_step)
        return self.bench.take()
