"""Running a model over many examples, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexp.data.types import Batch, Example, Forward, Tally


def scored(
    forward: Forward,
    collate: Callable[[Sequence[Example]], Batch],
    measure: Callable[[Tensor, Tensor, Sequence[Example]], Tally],
    examples: Sequence[Example],
    batch_size: int,
) -> Tally:
    """What ``measure`` finds for each of ``examples``, in their order, without gradients.

    Batches are formed after sorting by length and content, longest first, so that there is little padding, the
    largest batch comes first, and the composition of batches does not depend on the examples' order.
    """
    order = sorted(range(len(examples)), key=lambda index: _rank(examples[index]))
    found = Tally()
    for start in range(0, len(order), batch_size):
        some = [examples[index] for index in order[start : start + batch_size]]
        batch = collate(some)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = forward(batch).logits
            found.extend(measure(logits, labels, some))
    back = sorted(range(len(order)), key=order.__getitem__)
    return Tally(
        loss=[found.loss[k] for k in back],
        items=[found.items[k] for k in back],
        correct=[found.correct[k] for k in back] if found.correct else [],
        targets=[found.targets[k] for k in back] if found.targets else [],
    )


def _rank(example: Example) -> Any:
    ids = example.get("input_ids")
    if ids is None:  # images have one size: keep their order
        return 0
    labels = example["labels"]
    return (-len(ids), ids, labels if isinstance(labels, list) else [labels])
