"""SplitFed v1 and v2: split learning with averaging (Thapa et al., AAAI 2022, arXiv 2004.12088).

L-shaped: clients have embeddings and blocks [0, s), the server has the rest, the head and the labels
(:mod:`flexp.methods.two_sided`; s is ``method.splitfed.cut``).

**v1**: in a round the server keeps one copy of its side for each client; every client and its copy take
``train.steps_per_round`` steps as one model, in parallel; then

    client's side ← Σ n_k/n · client's side_k,        server's side ← Σ n_k/n · server's side_k

Both sides begin a round with fresh optimisers. With clipping off and equal optimisers on the two sides it is FedAvg,
bit for bit; with one client and one round it is local training. The personal model of every client is the average.
Budget: exact. Bytes: activations, masks and labels up, gradients down; the client's side both ways every round.

**v2**: as v1, but the server has one copy of its side, which all clients train one after the other: in a round, in an
order drawn anew from the seed, each client takes its ``train.steps_per_round`` steps with the server's side as the
client before it left it. Only the clients' side is averaged. The server's optimiser lasts, with a schedule over the
steps of all clients; the clients' are fresh each round.

The personal model is the averaged client's side under the server's. With one client and one round it is v1 and local
training. Budget: exact. Bytes: as v1's.
"""

from __future__ import annotations

from flexp.cost.clock import Schedule
from flexp.methods.base import OnStep, World
from flexp.methods.federated import Client
from flexp.methods.harness import Weights
from flexp.methods.two_sided import TwoSided
from flexp.rng import generator


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
        self.harness.put(received)
        server = self.server_updater(self.harness.server_side, self.world.total_steps)
        server.steps = client.workers["model"].steps
        self.split_steps(client, server, on_step)
        return self.harness.take()


class SplitFedV2(TwoSided):
    """SplitFed whose server's side all clients train in turn (Thapa et al., 2022)."""

    name = "splitfed-v2"
    table = "splitfed"
    timing = Schedule("split-sync", one_at_a_time=True)

    def order(self, number: int) -> list[Client]:
        drawn = generator(self.world.config.seed, "splitfed-v2", number).permutation(len(self.participants))
        return [self.participants[int(index)] for index in drawn]

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        self.harness.put(received)
        self.split_steps(client, self.lasting, on_step)
        return self.harness.take(self.shared)
