"""Which codec each tensor of a message crosses in, and what rounding took from the gradients so far.

Both ends of every link use this, so that a codec changes numbers in the same way over each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexp.config import CodecConfig
from flexp.errors import LinkError
from flexp.links.codecs import SCALE, Codec, codec_of
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest, tensors
from flexp.links.wire import Kind

KINDS: dict[type[Any], Kind] = {
    ForwardRequest: Kind.FORWARD,
    ForwardReply: Kind.FORWARD_REPLY,
    BackwardRequest: Kind.BACKWARD,
    BackwardReply: Kind.BACKWARD_REPLY,
}


def codec_name(config: CodecConfig, kind: Kind, field: str) -> str | None:
    """The name of the codec of a field; ``None`` for masks, positions and weights, which cross as they are."""
    match kind, field:
        case (Kind.FORWARD, "hidden_BTH"):
            return config.activation
        case (Kind.FORWARD, "base_BTH" | "inner_BTH"):
            return config.aligned
        case (Kind.FORWARD_REPLY, "hidden_BTH"):
            return config.activation_down or config.activation
        case (Kind.BACKWARD, "grad_BTH"):
            return config.gradient
        case (Kind.BACKWARD_REPLY, "grad_BTH" | "inner_BTH"):
            return config.gradient_down or config.gradient
    return None


class Coding:
    """One end of a client's link: codes what it sends and decodes what it receives.

    Error feedback is for gradients, which are summed over tokens and steps: what rounding took from them, summed over
    the tokens, is added to the next gradient of the same field, in equal parts to its tokens whose gradient is not zero
    throughout. So the sum of all that was sent stays within one tensor's rounding of the sum of all that should have
    been. The tokens themselves are others each time, so nothing finer can be carried on. Activations are not summed.

    Args:
        dtype: of the model.
        hidden: H.
        residuals: by field, (H,) float32: where to go on from, and where to keep it; may be saved and given back.
    """

    def __init__(
        self,
        config: CodecConfig | None,
        dtype: torch.dtype,
        hidden: int,
        residuals: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config or CodecConfig()
        self.residuals = {} if residuals is None else residuals
        self._dtype, self._hidden = dtype, hidden

    @property
    def exact(self) -> bool:
        """Whether everything crosses as it is."""
        return self.config.exact

    def encode(self, kind: Kind, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(field, tensor) of a message as (field, tensor) of its frame: payloads, each with its scales behind it."""
        place = 0
        for name, value in named:
            codec = self._codec(kind, name)
            if codec is None:
                yield name, value
                continue
            if self.config.error_feedback and kind in (Kind.BACKWARD, Kind.BACKWARD_REPLY):
                place += 1  # inner gradients have one name, and each a residual of its own
                parts = self._with_feedback(f"{kind.name}.{place}", value, codec)
            else:
                parts = codec.encode(value)
            yield from zip((name, name + SCALE), parts, strict=False)

    def decode(self, kind: Kind, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`encode` was given, as near as the codec comes; the head was accepted by the rules already."""
        given = list(named)
        while given:
            name, value = given.pop(0)
            codec = self._codec(kind, name)
            if codec is None:
                yield name, value
                continue
            parts = [value]
            if given and given[0][0] == name + SCALE:
                parts.append(given.pop(0)[1])
            yield name, codec.decode(tuple(parts), self._hidden, self._dtype)

    def size(self, message: Any) -> int:
        """The bytes of a message's tensors as they cross."""
        kind, total = KINDS.get(type(message)), 0
        for name, value in tensors(message):
            codec = None if kind is None else self._codec(kind, name)
            if codec is not None:
                total += sum(dtype.itemsize * math.prod(shape) for dtype, shape in codec.layout(tuple(value.shape)))
            else:
                total += value.numel() * (1 if name == "mask_BT" else value.element_size())
        return total

    def _codec(self, kind: Kind, field: str) -> Codec | None:
        name = codec_name(self.config, kind, field)
        return None if name is None or name == "off" else codec_of(name, self._dtype)

    def _with_feedback(self, key: str, value: Tensor, codec: Codec) -> tuple[Tensor, ...]:
        rows = value.float().reshape(-1, value.shape[-1])
        counted = (rows != 0).any(1, keepdim=True)
        if not bool(counted.any()):
            return codec.encode(value)
        owed = self.residuals.get(key)
        if owed is not None:
            rows = rows + counted * (owed.to(rows.device) / counted.sum())
        parts = codec.encode(rows.reshape(value.shape))
        sent = codec.decode(parts, self._hidden, torch.float32).reshape(rows.shape)
        left = (rows - sent).sum(0)
        if bool(left.isfinite().all()):  # what is refused as not finite must not spoil what comes after it
            self.residuals[key] = left.detach()
        else:
            self.residuals.pop(key, None)
        return parts


def save_residuals(residuals: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies, as flat named tensors."""
    return {f"{prefix}{key}": value.clone() for key, value in residuals.items()}


def load_residuals(residuals: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Go on from saved ones, in place, since both the link and its owner hold them.

    Raises:
        LinkError: they are none.
    """
    odd = [key for key, value in state.items() if value.dim() != 1 or value.dtype != torch.float32]
    if odd:
        raise LinkError(f"the saved residual {odd[0]} of error feedback is no float32 vector")
    residuals.clear()
    residuals.update({key: value.clone() for key, value in state.items()})
