"""How good a model is on a list of examples, in batches of like length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexp.data.types import Batch, Example, Forward, Tally, Task
from flexp.errors import DataError
from flexp.finite import IMPOSSIBLE, NOT_FINITE, UNDEFINED, without_scores
from flexp.kinds import logits_of, take_targets

SPANS = ("start_positions", "end_positions")
Scores = dict[str, Any]
"""``loss`` (mean over items: examples, or labelled tokens), ``n`` (examples) and the task's scores; ``None`` where the
examples do not say (no F1 of a class that is not there). With extras also tables: lists, and scores by class."""


def evaluate(forward: Forward, task: Task, examples: Sequence[Example], batch_size: int, extras: bool = True) -> Scores:
    """Score a whole or a split model. The examples' order does not matter, nor does ``batch_size`` but for rounding.

    Args:
        forward: given a collated batch without labels, returns something with ``.logits``. Putting the model into
            evaluation mode and the batch onto its device is the caller's business.
        extras: also tables, and the scores for which the task needs passes of its own.

    Returns:
        ``loss``, ``n``, and what :meth:`~flexp.data.types.Task.figures` says. Every score is ``None`` where the model
        answers an example with numbers that are not finite (:mod:`flexp.finite`), and ``not_finite`` says how many.
        ``impossible`` counts examples of infinite loss; ``undefined`` names the metric, where there is nothing to
        score.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("there are no examples to score; set data.test_fraction above 0 or name data.test_source")
    tally = scored(forward, task.collate, task.measure, examples, batch_size)
    with np.errstate(all="ignore"):  # what is not finite is told below
        figures = task.figures(tally)
    scores: Scores = {"loss": math.fsum(tally.loss) / sum(tally.items), "n": len(examples), **figures}
    if broken := tally.broken:
        return without_scores(scores | {NOT_FINITE: broken})
    if scores.get(task.metric, 0) is None:
        scores[UNDEFINED] = [task.metric]
    if impossible := sum(map(math.isinf, tally.loss)):
        scores[IMPOSSIBLE] = impossible
    if not extras:
        return scores
    further = task.score(forward, examples, batch_size)
    if any(
        isinstance(value, float) and math.isnan(value) for value in further.values()
    ):  # passes of its own, which found what the first did not
        return without_scores(scores | further | {NOT_FINITE: len(examples)})
    return scores | task.details(tally) | further


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
    found = Tally()
    for batch, some in in_batches(collate, examples, batch_size):
        labels = take_targets(batch)
        with torch.no_grad():
            found.extend(measure(logits_of(forward(batch)), labels, some))
    order = _order(examples)
    return found.reordered(sorted(range(len(order)), key=order.__getitem__))


def unanswered(logits: Tensor, batch: Batch, numbers: bool = False) -> list[bool]:
    """Of each example of a collated batch, whether what the model gives for it is no answer: NaN or infinity, for a
    token that is no padding. A logit of -inf is one, but where logits are ``numbers``."""
    odd = ~logits.isfinite() if numbers else logits.isnan() | logits.isposinf()
    mask = batch.get("attention_mask")
    if mask is not None and odd.dim() == 3:  # by token
        odd = odd & (mask.to(odd.device) != 0).unsqueeze(-1)
    found: list[bool] = odd.reshape(len(odd), -1).any(-1).tolist()
    return found


def in_batches(
    collate: Callable[[Sequence[Example]], Batch], examples: Sequence[Example], batch_size: int
) -> Iterator[tuple[Batch, list[Example]]]:
    """All examples once, in collated batches of like length, longest first."""
    order = _order(examples)
    for start in range(0, len(order), batch_size):
        some = [examples[index] for index in order[start : start + batch_size]]
        yield collate(some), some


def _order(examples: Sequence[Example]) -> list[int]:
    return sorted(range(len(examples)), key=lambda index: _rank(examples[index]))


def _rank(example: Example) -> Any:
    ids = example.get("input_ids")
    if ids is None:  # images have one size: keep their order
        return 0
    labels = example.get("labels", [example.get(name) for name in SPANS])
    return (-len(ids), ids, labels if isinstance(labels, list) else [labels])
