"""Any number of labels for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.config import DataConfig
from flexp.data.columns import lists_of_labels
from flexp.data.measures import several_f1, several_scores
from flexp.data.survey import LABELS, Column, column_of, text_column
from flexp.data.tasks.base import SeveralLabels
from flexp.data.tasks.text import TextTask
from flexp.data.types import Batch, Example, Row, Tally
from flexp.errors import DataError
from flexp.kinds import ModelKind

TAGS = ("tags", "topics", "genres")
SEPARATORS = ("|", ";", ",")
_THERE = frozenset(("0", "1", "0.0", "1.0", "true", "false", "True", "False"))


class MultiLabel(SeveralLabels, TextTask):
    """Each class of ``label_names`` is there or not. The label column holds lists, or text that
    ``data.label_separator`` divides; it may be empty."""

    name = "multi-label"
    model_kind: ModelKind = "multi-label-classification"
    metric = "micro_f1"

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        text, label = (
            text_column(columns),
            column_of(columns, "list", (*LABELS, *TAGS)),
        )
        if label is not None:
            return None if text is None else {"text": text, "label": label}
        for column in columns:  # text in which a sign divides the labels of most rows
            values = [value for value, _ in column.common]
            sign = next((s for s in SEPARATORS if sum(s in value for value in values) > len(values) / 2), None)
            if sign is not None and column.kind == "text" and column.name.lower() in (*LABELS, *TAGS):
                text = text_column([other for other in columns if other is not column])
                return None if text is None else {"text": text, "label": column.name, "label_separator": sign}
        return None

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {} if config.text_pair is None else {config.text_pair: "data.text_pair"}

    @classmethod
    def gaps(cls, config: DataConfig) -> Collection[str]:
        return [config.label]

    @classmethod
    def read_labels(
        cls, values: Sequence[Any], names: list[str] | None, config: DataConfig, place: Callable[[int], str]
    ) -> list[list[str]]:
        text = next((index for index, value in enumerate(values) if isinstance(value, str)), None)
        if text is not None and config.label_separator is None:
            raise DataError(
                f"{place(text)}: the column {config.label!r} holds text; say with data.label_separator what divides "
                'its labels ("|" for instance), or write lists'
            )
        found = lists_of_labels(values, names, config.label, config.label_separator, place)
        lengths = {len(labels) for labels in found}
        if len(lengths) == 1 and max(lengths) > 1 and {*chain(*found)} <= _THERE:
            raise DataError(
                f"{place(0)}: the column {config.label!r} holds {', '.join(found[0][:6])}, of as many parts in every "
                "row: whether each label is there; write the names of those that are"
            )
        return [list(dict.fromkeys(labels)) for labels in found]

    @classmethod
    def no_label(cls, names: Sequence[str]) -> list[str]:
        return []

    def classes_in(self, example: Example) -> list[str]:
        return [name for name, there in zip(self.label_names, example["labels"], strict=True) if there]

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The text (or the filled template), with ``labels`` 1 for each class that is there and 0 for others."""
        examples = self.inputs(rows)
        for example, row in zip(examples, rows, strict=True):
            there = set(row[self.config.label])
            example["labels"] = [float(name in there) for name in self.label_names]
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A padded batch with ``labels`` (B, C), floats."""
        return self.with_floats(examples)

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Binary cross-entropies, the mean over classes, and probabilities."""
        logits_BC, labels_BC = logits.float(), labels.float().to(logits.device)
        loss_B = F.binary_cross_entropy_with_logits(logits_BC, labels_BC, reduction="none").mean(-1)
        answers = torch.sigmoid(logits_BC).tolist()
        return Tally(loss_B.tolist(), [1] * len(labels), targets=labels_BC.tolist(), answers=answers)

    def figures(self, tally: Tally) -> dict[str, Any]:
        """``micro_f1``, ``macro_f1``, ``exact_match`` (all labels of an example right) and ``auc``."""
        return several_scores(tally.answers, tally.targets)

    def details(self, tally: Tally) -> dict[str, Any]:
        """``f1_by_class``."""
        return {"f1_by_class": dict(zip(self.label_names, several_f1(tally.answers, tally.targets), strict=True))}

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The labels with a probability of one half at least, and the probability of each."""
        found = []
        for values in torch.sigmoid(logits.double()).tolist():
            row = dict(zip(self.label_names, values, strict=True))
            found.append({"predicted": [name for name in row if row[name] >= 0.5], "probabilities": row})
        return found
