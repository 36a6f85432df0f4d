"""Messages as frames and back: in what codec each tensor crosses, and what rounding took from the gradients so far.

Both ends of every link use this, so that a codec changes numbers in the same way over each of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexp.config import CodecConfig
from flexp.errors import LinkError
from flexp.links import asking, passing  # noqa: F401  (whoever carries messages knows them all)
from flexp.links.codecs import SCALE, Codec, codec_of
from flexp.links.declaring import MESSAGES, Tensors, declared
from flexp.links.frames import NAMES, TYPES, Frame, Head, describe


def codec_name(config: CodecConfig, tensors: Tensors) -> str:
    """The codec of a field's tensors; ``off``: they cross as they are."""
    if tensors.codec is None:
        return "off"
    return str(getattr(config, tensors.codec) or getattr(config, tensors.codec.removesuffix("_down")))


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
        config: CodecConfig | None = None,
        dtype: torch.dtype = torch.float32,
        hidden: int = 0,
        residuals: dict[str, Tensor] | None = None,
    ) -> None:
        self.config = config or CodecConfig()
        self.residuals = {} if residuals is None else residuals
        self._dtype, self._hidden = dtype, hidden

    @property
    def exact(self) -> bool:
        """Whether everything crosses as it is."""
        return self.config.exact

    def frame(self, message: Any, call: int, seconds: float = 0.0) -> Frame:
        """The frame that carries a message. With error feedback a frame that is sent twice is made once.

        Raises:
            LinkError: the message holds what cannot cross.
        """
        declaration = declared(type(message))
        scalars, sent = declaration.texts(message), dict[str, Tensor]()
        place = 0
        for entry in declaration.entries:
            for name, value in entry.split(getattr(message, entry.field)):
                if entry.tensors.flags:
                    scalars[name], sent[name] = NAMES[value.dtype], _flags(name, value)
                    continue
                place += 1  # inner gradients have each a residual of their own
                parts = self._encoded(entry.tensors, f"{entry.tensors.codec}.{place}", value)
                sent |= zip((name, name + SCALE), parts, strict=False)
        fields = tuple(describe(name, value) for name, value in sent.items())
        return Frame(Head(declaration.name, call, seconds, scalars, fields), tuple(sent.values()))

    def message(self, frame: Frame, device: torch.device) -> Any:
        """What :meth:`frame` was given, as near as the codecs come, on ``device``; its head was accepted already.

        Raises:
            LinkError: a scalar is not what was declared, or a mask holds other values than zeros and ones.
        """
        kind = MESSAGES[frame.head.message]
        declaration, named, scalars = declared(kind), frame.named(), dict(frame.head.scalars)
        values: dict[str, Any] = {}
        for entry in declaration.entries:
            found = {}
            for name in entry.names(named):
                if entry.tensors.flags:
                    found[name] = _restored(name, named[name], scalars.pop(name, "")).to(device)
                    continue
                parts = [named[part].to(device) for part in (name, name + SCALE) if part in named]
                found[name] = self._decoded(entry.tensors, parts)
            values[entry.field] = entry.join(found)
        return kind(**values, **declaration.values(scalars))

    def size(self, message: Any) -> int:
        """The bytes of a message's tensors as they cross."""
        total = 0
        for entry in declared(type(message)).entries:
            for _, value in entry.split(getattr(message, entry.field)):
                codec = self._codec(entry.tensors)
                layout = ((value.dtype, value.shape),) if codec is None else codec.layout(tuple(value.shape))
                total += sum(
                    (1 if entry.tensors.flags else dtype.itemsize) * math.prod(shape) for dtype, shape in layout
                )
        return total

    def _codec(self, tensors: Tensors) -> Codec | None:
        name = codec_name(self.config, tensors)
        return None if name == "off" else codec_of(name, self._dtype)

    def _encoded(self, tensors: Tensors, key: str, value: Tensor) -> tuple[Tensor, ...]:
        codec = self._codec(tensors)
        if codec is None:
            return (value,)
        if self.config.error_feedback and key.startswith("gradient"):
            return self._with_feedback(key, value, codec)
        return codec.encode(value)

    def _decoded(self, tensors: Tensors, parts: list[Tensor]) -> Tensor:
        codec = self._codec(tensors)
        return parts[0] if codec is None else codec.decode(tuple(parts), self._hidden, self._dtype)

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


PLAIN = Coding()
"""Everything crosses as it is."""


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


def _flags(name: str, value: Tensor) -> Tensor:
    if value.dtype not in NAMES or not bool(((value == 0) | (value == 1)).all()):
        raise LinkError(f"{name} holds other values than 0 and 1")
    return value.to(torch.uint8)


def _restored(name: str, value: Tensor, dtype: str) -> Tensor:
    if dtype not in TYPES or int(value.max()) > 1:
        raise LinkError(f"{name} holds other values than 0 and 1, or would be of the type {dtype!r}")
    return value.to(TYPES[dtype])
