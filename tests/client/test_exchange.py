"""What a batch counts of its step, for loops that say how many items the step has, or nothing."""

from __future__ import annotations

import torch

from flexp.kinds import share_of

LABELS = torch.tensor([[1, 2, 3, -100], [4, 5, -100, -100]])  # shifted by one: 2 + 1 predicted tokens
IDS = torch.zeros(2, 4, dtype=torch.long)


def test_share_and_items() -> None:
    assert share_of("causal-lm", {"input_ids": IDS, "labels": LABELS}, 0.25) == (0.25, 3.0)
    total = {"num_items_in_batch": torch.tensor(12)}
    assert share_of("causal-lm", {"input_ids": IDS, "labels": LABELS, **total}, 0.5) == (0.25, 3.0)
    classes = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    assert share_of("sequence-classification", {**classes, "num_items_in_batch": 8}, 0.5) == (0.25, 2.0)


def test_labels_that_are_kept_back_count_evenly_but_no_more_than_there_are_tokens() -> None:
    assert share_of("causal-lm", {"input_ids": IDS, "num_items_in_batch": 12}, 0.5) == (0.5, 6.0)
    assert share_of("causal-lm", {"input_ids": IDS, "num_items_in_batch": 100}, 0.5) == (0.5, 8.0)
