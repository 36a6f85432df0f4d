"""SplitFed v2: the server's side is trained client after client (Thapa et al., AAAI 2022, arXiv 2004.12088).

As v1 (:mod:`flexp.methods.splitfed_v1`), but the server has one copy of its side, which all clients train one after the
other: in a round, in an order drawn anew from the seed, each client takes its ``train.steps_per_round`` steps with the
server's side as the client before it left it. Only the clients' side is averaged. The server's optimiser lasts, with a
schedule over the steps of all clients; the clients' are fresh each round.

The personal model is the averaged client's side under the server's. With one client and one round it is v1 and local
training. Budget: exact. Bytes: as v1's.
"""

from __future__ import annotations

from flexp.cost.clock import Schedule
from flexp.data.ordering import generator
from flexp.methods.base import OnStep
from flexp.methods.federated import Client
from flexp.methods.two_sided import TwoSided
from flexp.methods.workbench import Weights


class SplitFedV2(TwoSided):
    """SplitFed whose server's side all clients train in turn (Thapa et al., 2022)."""

    name = "splitfed-v2"
    table = "splitfed"
    timing = Schedule("split-sync", one_at_a_time=True)

    def order(self, number: int) -> list[Client]:
        drawn = generator(self.world.config.seed, "splitfed-v2", number).permutation(len(self.participants))
        return [self.participants[int(index)] for index in drawn]

    def turn(self, client: Client, received: Weights, number: int, on_step: OnStep) -> Weights:
        self.bench.put(received)
        self.split_steps(client, self.lasting, on_step)
        return self.bench.take(self.shared)
