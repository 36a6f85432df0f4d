"""Labels that were answered at random: what a gradient tells of them is what such an answer tells.

Randomised response (Warner 1965; for training, Ghazi et al. 2021, arXiv 2102.06062): each label stands with probability
e^ε ÷ (e^ε + C − 1), and is one of the others else. The answer belongs to the example and a key of the client's own, so
it is the same in every epoch; whatever training makes of it keeps ε-label differential privacy, gradients included.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexp.gaussian import BITS


class RandomLabels:
    """Answers for labels.

    Args:
        epsilon: ε.
        classes: C.
        key: whoever knows it and an example takes the answer back.
    """

    def __init__(self, epsilon: float, classes: int, key: int) -> None:
        self.classes, self.key = classes, key
        self.kept = 1 / (1 + (classes - 1) * math.exp(-epsilon))  # the probability that a label stands

    @property
    def auc(self) -> float:
        """The area under the curve, one class against the others, of who has the answer; who sees what was made of it
        has no larger one."""
        return (1 + self.kept - (1 - self.kept) / (self.classes - 1)) / 2

    def of(self, batch: Mapping[str, Any]) -> Tensor:
        """The answers for a batch's labels, (B,)."""
        labels_B: Tensor = batch["labels"]
        answers = [self._one(own, int(label)) for own, label in zip(_examples(batch), labels_B, strict=True)]
        return torch.tensor(answers, dtype=labels_B.dtype, device=labels_B.device)

    def _one(self, example: bytes, label: int) -> int:
        words = self.key.to_bytes(BITS // 8, "big") + label.to_bytes(8, "big") + example
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(words).digest(), "big"))
        if draw.random() < self.kept:
            return label
        return (label + 1 + int(draw.integers(self.classes - 1))) % self.classes


def epsilon_within(auc: float, classes: int) -> float:
    """The ε with which answers tell ``auc`` and no more (:attr:`RandomLabels.auc` turned around)."""
    told = 2 * auc - 1
    return math.log((1 + told * (classes - 1)) / (1 - told))


def _examples(batch: Mapping[str, Any]) -> list[bytes]:
    """What is each example's own, whatever else is in the batch."""
    if "input_ids" not in batch:
        return [bytes(each.cpu().float().numpy().tobytes()) for each in batch["pixel_values"]]
    ids_BT = batch["input_ids"]
    mask_BT = batch.get("attention_mask", torch.ones_like(ids_BT)).bool()
    pairs = zip(ids_BT, mask_BT, strict=True)
    return [bytes(ids_T[mask_T].cpu().numpy().astype("<i8").tobytes()) for ids_T, mask_T in pairs]
