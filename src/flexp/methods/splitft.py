"""SplitFT-like: split fine-tuning of LoRA adapters, of a lower rank next to the cut (after arXiv 2604.26388).

Every client has its own cut (s, e), as in FlexP-SFL: U-shaped, labels stay at home. Clients and server train adapters;
in the client's blocks next to the cut, s − 1 and e, these have the rank ``method.splitft.cut_rank`` (default: half of
``model.lora.rank``), elsewhere the full one. After every round each adapter (and a head that is trained) is averaged
over those clients that hold it, weighted by their examples; unequal ranks are padded with zeros, and a client of a
lower rank takes the first rows of A and columns of B. The scaling is alpha / ``model.lora.rank`` for all, so that
padding is exact.

What is "-like": the paper chooses and moves clients' cuts by their devices and by how training goes; here they stay as
configured. The U-shape, which block is next to the cut, and the server's update with every client's gradient as it
arrives (``server.update``) are FlexP's. What one client alone holds travels too, and comes back as it was.

Optimisers, personal model, budget and bytes are those of :mod:`flexp.methods.split_fedavg`. With one client, one round
and ``cut_rank`` = ``model.lora.rank`` it is local training with LoRA (clipping off).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import PositiveInt

from flexp.config import RunConfig, Section
from flexp.errors import ConfigError
from flexp.methods.base import Adapters, Cuts, World
from flexp.methods.split_fedavg import SplitFedAvg
from flexp.models.anatomy import Part


class SplitFt(SplitFedAvg):
    """Split fine-tuning of LoRA adapters with lower ranks next to each client's cut (after SplitFT).

    Raises:
        ConfigError: nothing is adapted, or the rank next to the cut is larger than elsewhere.
    """

    name = "splitft"
    deployed = None

    class Config(Section):
        """Adapters of a lower rank next to the cut."""

        cut_rank: PositiveInt | None = None  # of the client's blocks next to the cut; None: half of model.lora.rank

    @classmethod
    def cuts(cls, config: RunConfig, cuts: Mapping[str, tuple[int, int]], blocks: int) -> Cuts:
        return dict(cuts)

    @classmethod
    def adapters(cls, world: World, client: str) -> Adapters:
        """With the lower rank in those blocks next to the cut that the client has, s − 1 and e."""
        (start, stop), rank = world.cuts[client], cls.cut_rank(world.config)
        held = Part.client((start, stop), world.source.anatomy.blocks).blocks
        return Adapters(world.config.model.lora, {block: rank for block in (start - 1, stop) if block in held})

    @classmethod
    def cut_rank(cls, config: RunConfig) -> int:
        """Of a client's blocks next to its cut."""
        settings: SplitFt.Config = cls.own(config)
        return settings.cut_rank or max(1, config.model.lora.rank // 2)

    def prepared(self, world: World) -> World:
        model = world.config.model
        if model.tuning != "lora":
            raise ConfigError("method splitft trains LoRA adapters: it needs model.tuning = 'lora'")
        if (rank := self.cut_rank(world.config)) > model.lora.rank:
            raise ConfigError(
                f"method.splitft.cut_rank = {rank} is larger than model.lora.rank = {model.lora.rank}; "
                "expected at most that"
            )
        return world
