"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): of every adapter B·A the server averages A alone.

A says what adapters look at, which clients have in common; B, and the head, say what follows from it, and are a
client's own. Both are trained together: the averaged part begins each round with a fresh optimiser, the personal
part's goes on, as for FedPer. The personal model is the averaged A under the client's own B and head. Budget: exact.
Bytes: every A, both ways, every round: about half of FedAvg's with LoRA. With one client and one round it is local
training with LoRA.
"""

from __future__ import annotations

from flexp.errors import ConfigError
from flexp.methods.base import World
from flexp.methods.federated import Federated


class FedSaLora(Federated):
    """FedAvg of the A matrices of LoRA adapters; B and the head are personal (Guo et al., 2025).

    Raises:
        ConfigError: nothing is adapted.
    """

    name = "fedsa-lora"

    def __init__(self, world: World) -> None:
        if world.config.model.tuning != "lora":
            raise ConfigError("method fedsa-lora averages parts of LoRA adapters: it needs model.tuning = 'lora'")
        super().__init__(world)

    def is_shared(self, name: str) -> bool:
        return "lora_A" in name
