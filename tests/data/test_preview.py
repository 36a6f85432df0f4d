from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexp.data import preview

from .tools import tokenizer

TOK = tokenizer()
IDS = TOK("what is it ? a red dog")["input_ids"]
TASK = SimpleNamespace(processor=TOK, label_names=None, classes_in=lambda example: ["cat"])


@pytest.mark.parametrize(
    ("example", "shown"),
    [
        ({"input_ids": IDS, "labels": [-100] * 4 + IDS[4:]}, "what is it ?«a red dog»"),
        ({"input_ids": IDS, "labels": 3.5}, "what is it ? a red dog\n→ 3.5"),
        ({"input_ids": IDS, "start_positions": 5, "end_positions": 6}, "what is it ? a red dog\n→ red dog"),
        ({"pixel_values": torch.tensor([[[0.0, 1.0]]]), "labels": 0},
         "an image, 1 × 1 × 2 (channels × height × width), values 0.00 to 1.00\n→ cat"),
    ],
    ids=["text", "number", "span", "image"],
)  # fmt: skip
def test_an_example_as_the_model_sees_it(example: dict[str, Any], shown: str) -> None:
    assert preview.written(example, TASK) == shown
