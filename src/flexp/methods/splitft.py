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

from flexp.errors import ConfigError
from flexp.methods.base import World
from flexp.methods.client_ranks import beside_cut, splitft_rank
from flexp.methods.parties import own_stage
from flexp.methods.split_fedavg import SplitFedAvg
from flexp.models.parts import Part
from flexp.models.stage import Stage


class SplitFt(SplitFedAvg):
    """Each client's cut, and fewer ranks beside it.

    Raises:
        ConfigError: nothing is adapted, or the rank next to the cut is larger than elsewhere.
    """

    def prepared(self, world: World) -> World:
        model = world.config.model
        if model.tuning != "lora":
            raise ConfigError("method splitft trains LoRA adapters: it needs model.tuning = 'lora'")
        self.cut_rank = splitft_rank(world.config.method, model.lora)
        if self.cut_rank > model.lora.rank:
            raise ConfigError(
                f"method.splitft.cut_rank = {self.cut_rank} is larger than model.lora.rank = {model.lora.rank}; "
                "expected at most that"
            )
        return world

    def _make_stage(self, world: World, cut: tuple[int, int]) -> Stage:
        blocks = world.source.anatomy.blocks
        return own_stage(world, Part.client(cut, blocks), beside_cut(cut, blocks, self.cut_rank))
