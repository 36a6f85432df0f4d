"""How good a model is on a list of examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from flexp.data.batching import scored
from flexp.data.types import Example, Forward, Task
from flexp.errors import DataError

Scores = dict[str, float]
"""``loss`` (mean over items: examples, or labelled tokens), ``n`` (examples) and the task's metrics."""


def evaluate(forward: Forward, task: Task, examples: Sequence[Example], batch_size: int, extras: bool = True) -> Scores:
    """Score a whole or a split model. The examples' order does not matter, nor does ``batch_size`` but for rounding.

    Args:
        forward: given a collated batch without labels, returns something with ``.logits``. Putting the model into
            evaluation mode and the batch onto its device is the caller's business.
        extras: also the scores for which the task needs passes of its own (multiple choice: ``cloze_accuracy``).

    Returns:
        ``loss``, ``n``, and ``accuracy`` with ``majority`` (the share of the most frequent answer, which a model that
        has learned nothing else reaches) or ``perplexity`` (exp of the loss) with ``tokens``.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("there are no examples to score; set data.test_fraction above 0 or name data.test_source")
    tally = scored(forward, task.collate, task.measure, examples, batch_size)
    items = sum(tally.items)
    loss = math.fsum(tally.loss) / items
    scores: Scores = {"loss": loss, "n": len(examples)}
    if tally.correct:
        scores["accuracy"] = sum(tally.correct) / len(examples)
        scores["majority"] = max(Counter(tally.targets).values()) / len(examples)
    else:
        scores["perplexity"] = math.exp(loss) if loss < 700 else loss if math.isnan(loss) else math.inf
        scores["tokens"] = items
    if extras:
        scores.update(task.score(forward, examples, batch_size))
    return scores
