"""What a client sends once: z of its examples, from a head that does not change. In memory, while it is joined."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexp.errors import LinkError
from flexp.links.messages import ForwardRequest, KeptForwardRequest
from flexp.links.packing import Places


@dataclass
class Examples:
    """By the client's own numbers: z of an example without padding, (tokens, H)."""

    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(value.numel() * value.element_size() for value in self.kept.values())

    def whole(self, request: KeptForwardRequest, client: str) -> tuple[ForwardRequest, dict[int, Tensor]]:
        """The forward that is asked for, with its activation put together; and the examples that came with it.

        Raises:
            LinkError: what came is not what its mask and its flags say, or an example is not kept here.
        """
        numbers, fresh = request.examples_B.tolist(), request.fresh_B.tolist()
        mask_BT = request.mask_BT.bool()
        lengths = mask_BT.sum(1).tolist()
        told = [length for length, new in zip(lengths, fresh, strict=True) if new]
        came = 0 if request.hidden_BTH is None else request.hidden_BTH.shape[1]
        if sum(told) != came or (request.hidden_BTH is not None and request.hidden_BTH.shape[0] != 1):
            raise LinkError(f"client {client}: {came} tokens came, expected {sum(told)} as its mask says")
        parts = iter(() if request.hidden_BTH is None else torch.split(request.hidden_BTH[0], told))
        new = {number: next(parts) for number, is_new in zip(numbers, fresh, strict=True) if is_new}
        values = [new.get(number, self.kept.get(number)) for number in numbers]
        for number, value, length in zip(numbers, values, lengths, strict=True):
            if value is None or len(value) != length:
                raise LinkError(
                    f"client {client}: of its example {number} {0 if value is None else len(value)} tokens are kept, "
                    f"expected {length}; send it again"
                )
        rows = [value for value in values if value is not None]
        hidden_BTH = Places.of(mask_BT).unpack(torch.cat(rows).unsqueeze(0))
        whole = ForwardRequest(
            request.exchange, hidden_BTH, request.mask_BT, train=True, step=request.step, rows_BT=request.rows_BT
        )
        return whole, new

    def keep(self, new: dict[int, Tensor], room: int) -> bool:
        """Keep examples if they take no more than ``room`` bytes; gives whether they are kept."""
        if sum(value.numel() * value.element_size() for value in new.values()) > room:
            return False
        self.kept |= {number: value.clone() for number, value in new.items()}
        return True
