"""Giving a client the shared weights of one block: what was trained, as it is, in answers of bounded size."""

from __future__ import annotations

from torch import Tensor

from flexp.links.frames import MOST_FIELDS
from flexp.links.messages import FetchReply, FetchRequest
from flexp.server.shared import SharedBlocks

MOST = 64 << 20
"""Bytes of an answer, whatever is asked for; but for a tensor that is larger."""


def give(shared: SharedBlocks, request: FetchRequest) -> FetchReply:
    """Copies of a block's trained tensors from the first that is asked for, until ``request.most`` bytes, or
    :data:`MOST`, are full.

    A tensor that is larger than that comes alone, so that every answer brings the client further. What was not trained
    (the base weights under LoRA, frozen blocks) is not sent: the client has it.
    """
    block_of = shared.stage.block_of
    trained = sorted(
        (name, value) for name, value in shared.updater.parameters.items() if block_of(name) == request.block
    )
    chosen: dict[str, Tensor] = {}
    size = 0
    for name, value in trained[request.first :]:
        size += value.numel() * value.element_size()
        if chosen and (size > min(request.most, MOST) or len(chosen) == MOST_FIELDS):
            break
        chosen[name] = value.detach().clone()
    return FetchReply(shared.version, len(trained), chosen)
