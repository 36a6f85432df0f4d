"""The table ``[link]``: in what form activations and gradients cross a link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from flexp.config.section import Section, named
from flexp.registry import CODECS

CodecName = Annotated[str, named(CODECS, "off")]


class CodecConfig(Section):
    """In what form tensors cross: ``off`` is as the model computes, bit for bit; see :mod:`flexp.links.codecs`."""

    activation: CodecName = "off"  # z up and h down
    gradient: CodecName = "off"  # ∂task/∂h up and ∂total/∂z down
    aligned: CodecName = "off"  # what goes up for alignment: z_base and the inner activations
    activation_down: CodecName | None = None  # h; None: as activation
    gradient_down: CodecName | None = None  # ∂total/∂z and the inner gradients; None: as gradient
    weights: Literal["off", "bf16", "fp16"] = "off"  # of shared blocks, down
    error_feedback: bool = False  # add to a gradient what rounding took from the earlier ones

    @classmethod
    def all(cls, name: CodecName, *, error_feedback: bool = False) -> CodecConfig:
        """One codec for everything."""
        return cls(activation=name, gradient=name, aligned=name, error_feedback=error_feedback)

    def names(self) -> Iterator[CodecName]:
        """Every codec that is used."""
        named = (
            self.activation, self.gradient, self.aligned, self.activation_down, self.gradient_down, self.weights
        )  # fmt: skip
        return (name for name in named if name is not None)

    @property
    def exact(self) -> bool:
        """Whether everything crosses as it is."""
        return all(name == "off" for name in self.names())


Rows = Literal["all", "logits", "loss"]
Cache = Literal["off", "memory", "disk"]


class LinkConfig(Section):
    """What crosses between clients and the server of FlexP-SFL."""

    # of h and ∂task/∂h, where the client has no block in its tail: all but padding, what logits or what the loss reads
    rows: Rows = "loss"
    # whether z of an example goes up once where nothing below the cut is trained, and where its server keeps it
    cache: Cache = "off"
    # with cache, where something below the cut is trained: z of an example goes up again once it has moved by more than
    # this share of its norm from what went up last, and is that until then; 0: with every step
    reuse: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    codec: CodecConfig = CodecConfig()
