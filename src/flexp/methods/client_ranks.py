"""The adapters that a client's device holds, where a method gives clients other ranks than ``model.lora.rank``."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexp.config import LoraConfig, MethodConfig
from flexp.methods.base import World
from flexp.models.parts import Part


@dataclass(frozen=True)
class Adapters:
    """``lora``: of most blocks. ``beside``: ranks of the blocks in which they are lower, by the blocks' indices."""

    lora: LoraConfig
    beside: dict[int, int] = field(default_factory=dict)


def adapters(world: World, client: str) -> Adapters:
    """What ``client`` holds itself; a simulation may keep it padded to a larger rank."""
    config, lora = world.config, world.config.model.lora
    if config.model.tuning != "lora":
        return Adapters(lora)
    if config.method.name == "hetlora":
        names = [data.name for data in world.federation.clients]
        return Adapters(lora.model_copy(update={"rank": hetlora_rank(config.method, lora, names.index(client))}))
    if config.method.name == "splitft":
        cut, rank = world.cuts[client], splitft_rank(config.method, lora)
        return Adapters(lora, beside_cut(cut, world.source.anatomy.blocks, rank))
    return Adapters(lora)


def hetlora_rank(method: MethodConfig, lora: LoraConfig, index: int) -> int:
    """Of the client at ``index``: ``method.hetlora.ranks`` in order, repeated."""
    ranks = method.hetlora.ranks or [lora.rank]
    return ranks[index % len(ranks)]


def splitft_rank(method: MethodConfig, lora: LoraConfig) -> int:
    """Of a client's blocks next to its cut."""
    wanted = method.splitft.cut_rank
    return max(1, lora.rank // 2) if wanted is None else wanted


def beside_cut(cut: tuple[int, int], blocks: int, rank: int) -> dict[int, int]:
    """``rank`` for the blocks next to ``cut`` that the client has, s − 1 and e."""
    own = Part.client(cut, blocks).blocks
    return {block: rank for block in (cut[0] - 1, cut[1]) if block in own}
