"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexp.config import DataConfig
from flexp.data.survey import Column, label_column, text_column
from flexp.data.tasks.base import OneClass
from flexp.data.tasks.text import TextTask
from flexp.data.types import Example, Row
from flexp.kinds import ModelKind


class Classification(OneClass, TextTask):
    """A classifier over ``label_names``, the same for every client. The label column holds label texts by now."""

    name = "classification"
    model_kind: ModelKind = "sequence-classification"

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        text, label = text_column(columns), label_column(columns)
        return None if text is None or label is None else {"text": text, "label": label}

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {} if config.text_pair is None else {config.text_pair: "data.text_pair"}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The text (or the filled template), with ``labels`` a class number."""
        examples = self.inputs(rows)
        for example, row in zip(examples, rows, strict=True):
            example["labels"] = self._number[row[self.config.label]]
        return examples
