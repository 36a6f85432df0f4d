"""HetLoRA: federated averaging of LoRA adapters of unequal ranks (Cho et al., EMNLP 2024, arXiv 2401.06432).

The server holds adapters of the largest rank R. A client of rank r (``data.clients.rank``) gets the first r rows of
A and columns of B, takes local steps, and sends them back; padded with zeros they are averaged:

    A ← Σ p_k pad(A_k),  B ← Σ p_k pad(B_k)    p_k: the client's share of Σ ‖B_k A_k‖_F, for each adapter by itself,
                                               or with ``weighting = "examples"`` its share of the examples

A head is weighted by examples in any case. The scaling is alpha / R for all, so that a padded adapter is the very
function of the one that was padded; and a client is trained as one of rank R whose entries beyond r are zero, since
these then have no gradient and stay zero. With equal ranks and ``"examples"`` it is FedAvg with LoRA. Not taken over
from the paper: the pruning of a client's own rank in training.

The personal model is the average cut to the client's rank. Budget: exact. Bytes: what of the adapters a client holds.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from flexp.config import Section
from flexp.errors import ConfigError
from flexp.methods.base import Adapters, World
from flexp.methods.federated import Averaging, Client, Federated
from flexp.methods.harness import Weights, size
from flexp.methods.parties import with_model
from flexp.methods.ranks import fit, of_rank


class HetLora(Federated):
    """FedAvg of LoRA adapters, each client with a rank of its own (Cho et al., 2024).

    Raises:
        ConfigError: nothing is adapted.
    """

    name = "hetlora"

    class Config(Section):
        """Averaged adapters of unequal ranks, which ``data.clients.rank`` says."""

        weighting: Literal["examples", "sparsity"] = "sparsity"  # by the norm of B·A, as in the paper

    @classmethod
    def adapters(cls, world: World, client: str) -> Adapters:
        lora, names = world.config.model.lora, [data.name for data in world.federation.clients]
        rank = world.config.data.clients.every(names)[client].rank or lora.rank
        return Adapters(lora.model_copy(update={"rank": rank}))

    def __init__(self, world: World) -> None:
        config = world.config
        self.settings: HetLora.Config = self.own(config)
        if config.model.tuning != "lora":
            raise ConfigError("method hetlora averages LoRA adapters: it needs model.tuning = 'lora'")
        self.ranks = {data.name: self.adapters(world, data.name).lora.rank for data in world.federation.clients}
        lora = config.model.lora.model_copy(update={"rank": max(self.ranks.values())})
        super().__init__(with_model(world, lora=lora))

    def make_server(self, weights: Weights) -> Averaging:
        sparsity = self.settings.weighting == "sparsity"
        return BySparsity(weights) if sparsity else Averaging(weights)

    def received_by(self, client: Client) -> Weights:
        rank = self.ranks[client.name]
        return {name: fit(of_rank(name, value, rank), value.shape) for name, value in self.server.weights.items()}

    def bytes_of(self, client: Client, weights: Weights) -> int:
        rank = self.ranks[client.name]
        return size({name: of_rank(name, value, rank) for name, value in weights.items()})

    def personal_weights(self, client: Client) -> Weights:
        return self.received_by(client)


class BySparsity(Averaging):
    """Weighs a client's adapter by the Frobenius norm of its B·A; adapters that are all zero, by examples."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self._sent: list[tuple[Weights, float]] = []

    def receive(self, weights: Weights, share: float) -> None:
        self._sent.append((weights, share))

    def finish(self, beta: float = 1.0) -> None:
        norms = [_norms(weights) for weights, _ in self._sent]
        totals = {name: sum(own[name] for own in norms) for name in (norms[0] if norms else {})}
        for (weights, share), own in zip(self._sent, norms, strict=True):
            for name, value in weights.items():
                total = totals.get(name, 0.0)
                super().receive({name: value}, own[name] / total if total else share)
        self._sent = []
        super().finish(beta)


def _norms(weights: Weights) -> dict[str, float]:
    """‖B·A‖_F of every adapter, under the names of both of its parameters."""
    found: dict[str, float] = {}
    for name, down in weights.items():
        if "lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            found[name] = found[partner] = _product_norm(weights[partner], down)
    return found


def _product_norm(up: Tensor, down: Tensor) -> float:
    """‖B·A‖_F from the two small Gram matrices: ‖BA‖² = ⟨BᵀB, AAᵀ⟩, since B·A itself is as large as the layer."""
    up, down = up.double(), down.double()
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
