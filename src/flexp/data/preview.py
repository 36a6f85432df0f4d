"""Clients and examples for people to look at, as the model will see them."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from statistics import median
from typing import Any

from flexp.data.types import ClientData, Example, Task
from flexp.kinds import IGNORED

MARKS = "«", "»"
"""Around what a language model learns to write."""

_MOST = 800
_LABELS = 6


def facts(client: ClientData, task: Task) -> list[str]:
    """Name, examples to train, validate and test, tokens of the middle and the longest one, and labels with counts."""
    examples = [*client.train, *client.validation, *client.test]
    lengths = [len(example["input_ids"]) for example in examples if "input_ids" in example]
    tokens = f"{median(lengths):.0f}, {max(lengths)}" if lengths else "–"
    counts = [len(part) for part in (client.train, client.validation, client.test)]
    return [client.name, *map(str, counts), tokens, labels(examples, task)]


def labels(examples: list[Example], task: Any) -> str:
    """``no 9, yes 12``: how many examples have each label; empty where there are none."""
    counts = Counter(name for example in examples for name in set(task.classes_in(example)))
    shown = [f"{name} {count}" for name, count in counts.most_common(_LABELS)]
    return ", ".join(shown) + (f" and {len(counts) - _LABELS} more" if len(counts) > _LABELS else "")


def written(example: Example, task: Any) -> str:
    """An encoded example as text: what the model reads, what it learns between :data:`MARKS`, and its label."""
    if "pixel_values" in example:
        values = example["pixel_values"]
        size = " × ".join(map(str, values.shape))
        text = f"an image, {size} (channels × height × width), values {values.min():.2f} to {values.max():.2f}"
        return f"{text}\n→ {', '.join(task.classes_in(example))}"
    ids, learnt = example["input_ids"], example.get("labels")
    if learnt is None:  # a span
        answer = ids[example["start_positions"] : example["end_positions"] + 1]
        return f"{_short(_text(ids, task))}\n→ {_text(answer, task)}"
    words = isinstance(learnt, list) and len(learnt) == len(ids)
    if words and all(label in (IGNORED, token) for label, token in zip(learnt, ids, strict=True)):
        runs = groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1] != IGNORED)
        parts = [(marked, _text([token for token, _ in run], task)) for marked, run in runs]
        return _short("".join(f"{MARKS[0]}{text}{MARKS[1]}" if marked else text for marked, text in parts))
    answer = ", ".join(task.classes_in(example)) if task.label_names is not None else str(learnt)
    return f"{_short(_text(ids, task))}\n→ {answer}"


def _text(ids: list[int], task: Any) -> str:
    return str(task.processor.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _short(text: str) -> str:
    """The end matters most: there is the answer."""
    return text if len(text) <= _MOST else f"{text[: _MOST // 4]} … {text[-3 * _MOST // 4 :]}"
