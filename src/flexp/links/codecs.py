"""Codecs: a tensor of shape (…, H) as the tensors that cross a link, and back.

The first of these is the *payload*; codecs with scales have a second one. Rounding is to the nearest, scales are the
largest magnitude that they stand for ÷ the largest code, so the error of an entry is at most half a step:

=============  ==========================  =========================================  =================================
name           payload                     scales                                     error of an entry, at most
=============  ==========================  =========================================  =================================
fp32           float32 (…, H)                                                         none
bf16           bfloat16 (…, H)                                                        2⁻⁸ of it
fp16           float16 (…, H), ±65504 at most                                         2⁻¹¹ of it, or 2⁻²⁵
int8-channel   int8 (…, H)                 float32 (H): one a channel, of all tokens  1/254 of the channel's largest
int8-row       int8 (…, H)                 float32 (…): one a token                   1/254 of the token's largest
fp8            float8_e4m3fn (…, H)        float32 (…): one a token                   2⁻⁴ of it, or 2⁻¹⁸ of the largest
int4           uint8 (…, ⌈H/2⌉), two each  bfloat16 (…, ⌈H/32⌉): one a group of 32    1/13.9 of the group's largest
=============  ==========================  =========================================  =================================

What is not finite stays so: the scale of its group is not finite either, and with it the whole group. Codecs without
scales keep it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

Shape = tuple[int, ...]
Layout = tuple[tuple[torch.dtype, Shape], ...]

GROUP = 32
SCALE = ".scale"
"""What is added to a payload's name for its scales'."""


class Codec(Protocol):
    """One form for tensors to cross in."""

    def layout(self, shape: Shape) -> Layout:
        """Types and shapes of what a tensor of ``shape`` crosses as."""
        ...

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        """A floating-point tensor as what crosses."""
        ...

    def decode(self, parts: tuple[Tensor, ...], hidden: int, dtype: torch.dtype) -> Tensor:
        """The tensor (…, ``hidden``) of ``dtype`` that ``parts`` stand for."""
        ...


@dataclass(frozen=True)
class Cast:
    """Another floating-point type."""

    dtype: torch.dtype

    def layout(self, shape: Shape) -> Layout:
        return ((self.dtype, shape),)

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        if value.dtype != self.dtype == torch.float16:
            most = torch.finfo(torch.float16).max
            # What is finite stays so: an overflow would be refused as if the gradient had exploded.
            value = torch.where(value.isfinite(), value.clamp(-most, most), value)
        return (value.to(self.dtype),)

    def decode(self, parts: tuple[Tensor, ...], hidden: int, dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Scaled:
    """Codes of one byte, with a scale for each token (``over`` = −1) or each channel (0: over all tokens)."""

    dtype: torch.dtype
    most: float
    over: int

    def layout(self, shape: Shape) -> Layout:
        return (self.dtype, shape), (torch.float32, shape[:-1] if self.over else shape[-1:])

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        rows = value.float().reshape(-1, value.shape[-1])
        scales = rows.abs().amax(self.over, keepdim=True) / self.most
        codes = _divided(rows, scales).clamp(-self.most, self.most)
        codes = codes.round() if self.dtype == torch.int8 else codes
        parts = codes.to(self.dtype), scales.flatten()
        return tuple(part.reshape(shape) for part, (_, shape) in zip(parts, self.layout(value.shape), strict=True))

    def decode(self, parts: tuple[Tensor, ...], hidden: int, dtype: torch.dtype) -> Tensor:
        codes, scales = parts
        return (codes.float() * (scales.unsqueeze(-1) if self.over else scales)).to(dtype)


@dataclass(frozen=True)
class Nibbles:
    """Codes of four bits, −7 to 7, in groups of :data:`GROUP` neighbours with a scale each.

    The lower half of a byte is the entry of even index; a code crosses with 8 added to it. The last group may be
    shorter; behind an odd H stands a code of 0.
    """

    def layout(self, shape: Shape) -> Layout:
        *front, hidden = shape
        return (torch.uint8, (*front, -(-hidden // 2))), (torch.bfloat16, (*front, -(-hidden // GROUP)))

    def encode(self, value: Tensor) -> tuple[Tensor, ...]:
        hidden = value.shape[-1]
        groups = _grouped(value.float())
        scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
        codes = _divided(groups, scales.float().unsqueeze(-1)).round().clamp(-7, 7)
        pairs = (codes + 8).to(torch.uint8).flatten(-2)
        pairs = pairs[..., : hidden + hidden % 2]
        return pairs[..., 0::2] | (pairs[..., 1::2] << 4), scales

    def decode(self, parts: tuple[Tensor, ...], hidden: int, dtype: torch.dtype) -> Tensor:
        pairs, scales = parts
        codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2).float() - 8
        values = (_grouped(codes) * scales.float().unsqueeze(-1)).flatten(-2)
        return values[..., :hidden].to(dtype)


def _grouped(value: Tensor) -> Tensor:
    """(…, H) as (…, ⌈H/32⌉, 32), with zeros behind."""
    return pad(value, (0, -value.shape[-1] % GROUP)).reshape(*value.shape[:-1], -1, GROUP)


def _divided(value: Tensor, scales: Tensor) -> Tensor:
    """``value`` ÷ ``scales``, and 0 where that means nothing: all is zero there, or the scale says that all is lost."""
    return torch.where((scales > 0) & scales.isfinite(), value / scales, 0.0).nan_to_num(0.0)


CODECS: dict[str, Codec] = {
    "fp32": Cast(torch.float32),
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8-channel": Scaled(torch.int8, 127.0, 0),
    "int8-row": Scaled(torch.int8, 127.0, -1),
    "fp8": Scaled(torch.float8_e4m3fn, 448.0, -1),
    "int4": Nibbles(),
}
"""All but ``off``, which leaves tensors as they are."""


def codec_of(name: str, dtype: torch.dtype) -> Codec:
    """The codec of a name; ``off`` is the model's own ``dtype``."""
    return CODECS[name] if name in CODECS else Cast(dtype)
