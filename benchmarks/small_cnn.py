"""The small convolutional network of federated learning's image benchmarks, as a stage that every method runs on.

Two convolutions and two linear layers (McMahan et al., AISTATS 2017, arXiv 1602.05629, sect. 3, without padding), as
PFLlib's "4-layer CNN": 582,026 numbers for grey pictures of 28 × 28 pixels and ten classes. It is no transformer and is
never cut; its three first layers stand where a transformer has blocks, so that methods which tell a body from a head
find them where they look.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexp.models.anatomy import Anatomy
from flexp.models.parts import Part
from flexp.models.stage import Stage

_FEATURES = 512


class SmallCnn(nn.Module):
    """Pictures (B, channels, side, side) to logits (B, classes), with the names that FlexP asks of a model."""

    base_model_prefix = "base"
    main_input_name = "pixel_values"

    def __init__(self, channels: int = 1, side: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=_FEATURES)
        left = ((side - 4) // 2 - 4) // 2  # pixels of a side after two convolutions of 5 × 5 and two poolings
        self.base = nn.Module()
        self.base.blocks = nn.ModuleList(
            [
                _convolution(channels, 32),
                _convolution(32, 64),
                nn.Sequential(nn.Flatten(), nn.Linear(64 * left * left, _FEATURES), nn.ReLU()),
            ]
        )
        self.classifier = nn.Linear(_FEATURES, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on a CPU

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """An object with ``logits`` and, given labels (B,), the mean cross-entropy ``loss``."""
        hidden = pixel_values
        blocks = self.base.blocks
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            hidden = block(hidden)
        logits_BC = self.classifier(hidden)
        return SimpleNamespace(loss=None if labels is None else F.cross_entropy(logits_BC, labels), logits=logits_BC)


def small_cnn(seed: int, *, channels: int = 1, side: int = 28, classes: int = 10) -> Stage:
    """The network with weights drawn from ``seed`` as torch's layers draw them, whole and frozen by nobody."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCnn(channels, side, classes)
    anatomy = Anatomy(path="base.blocks", blocks=3, hidden=_FEATURES, image=True)
    return Stage(model, anatomy, Part.whole(anatomy.blocks))


def _convolution(channels: int, filters: int) -> nn.Sequential:
    # Pooling first: it gives the same as ReLU first, and ReLU has a quarter of the work.
    return nn.Sequential(nn.Conv2d(channels, filters, 5), nn.MaxPool2d(2), nn.ReLU())
