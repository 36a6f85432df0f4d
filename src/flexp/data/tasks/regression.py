"""A number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexp.config import DataConfig
from flexp.data.measures import number_scores
from flexp.data.survey import Column, column_of, text_column
from flexp.data.tasks.text import TextTask
from flexp.data.types import Batch, Example, Row, Tally
from flexp.errors import DataError
from flexp.kinds import ModelKind

NUMBERS = ("score", "label", "target", "rating", "value", "y", "stars", "price")
STRATA = 10
_LARGEST = 1e18
"""Its square is well within float32."""
"""Rows are divided by the tenth of the numbers that theirs is in."""


class Regression(TextTask):
    """The label column holds numbers; they are learned as they are, by their squared error."""

    name = "regression"
    model_kind: ModelKind = "regression"
    metric = "rmse"
    labelled = True
    answers = True

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        measured = [column for column in columns if not column.whole]
        text, label = text_column(columns), column_of(measured, "number", NUMBERS) or column_of(measured, "number")
        return None if text is None or label is None else {"text": text, "label": label}

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {} if config.text_pair is None else {config.text_pair: "data.text_pair"}

    @classmethod
    def read_labels(
        cls, values: Sequence[Any], names: list[str] | None, config: DataConfig, place: Callable[[int], str]
    ) -> list[float]:
        comma = _decimal_comma([value for value in values if isinstance(value, str)])
        texts = [value.replace(",", ".") if comma and isinstance(value, str) else value for value in values]
        return [_number(value, config.label, place, index) for index, value in enumerate(texts)]

    @classmethod
    def strata(cls, labels: Sequence[float]) -> list[str]:
        """The tenth of all numbers that a row's is in."""
        if not labels:
            return []
        edges = np.quantile(labels, np.linspace(0, 1, STRATA + 1)[1:-1])
        return [str(place) for place in np.searchsorted(edges, labels, side="right")]

    @classmethod
    def no_label(cls, names: Sequence[str]) -> float:
        return 0.0

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The text (or the filled template), with ``labels`` a number."""
        examples = self.inputs(rows)
        for example, row in zip(examples, rows, strict=True):
            example["labels"] = row[self.config.label]
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A padded batch with ``labels`` (B,), floats."""
        return self.with_floats(examples)

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Squared errors."""
        given_B, right_B = logits.double().reshape(len(labels)), labels.double().to(logits.device)
        squared_B = (given_B - right_B) ** 2
        return Tally(squared_B.tolist(), [1] * len(labels), targets=right_B.tolist(), answers=given_B.tolist())

    def figures(self, tally: Tally) -> dict[str, Any]:
        """``rmse``, ``mae``, ``r2`` and ``pearson``."""
        return number_scores(tally.answers, tally.targets)

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The number."""
        return [{"predicted": value} for value in torch.reshape(logits.double(), (len(examples),)).tolist()]


def _decimal_comma(texts: Sequence[str]) -> bool:
    """Whether numbers are written as ``3,5``; not where points stand too, or each comma might divide thousands."""
    after = [text.strip().partition(",")[2] for text in texts if "," in text]
    return not any("." in text for text in texts) and any(len(digits) != 3 for digits in after)


def _number(value: Any, column: str, place: Callable[[int], str], index: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number) and abs(number) > _LARGEST:
        raise DataError(
            f"{place(index)}: {str(value)[:40]!r} in column {column!r} is too large for float32, in which its error is "
            "squared; if it marks what is missing, remove the row, else divide all numbers"
        )
    if not math.isfinite(number):
        raise DataError(
            f"{place(index)}: {str(value)[:40]!r} in column {column!r} is no number; write numbers with a point, or "
            'use data.task = "classification" for labels'
        )
    return number
