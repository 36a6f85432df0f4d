"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexp.config import DataConfig
from flexp.data.columns import as_text
from flexp.data.tasks.base import TextTask, class_tally, place
from flexp.data.tasks.text import encode_texts
from flexp.data.types import Example, Row, Tally
from flexp.kinds import ModelKind


class Classification(TextTask):
    """A classifier over ``label_names``, the same for every client. The label column holds label texts by now."""

    name = "classification"
    model_kind: ModelKind = "sequence-classification"
    metric = "accuracy"
    higher_is_better = True
    labelled = True
    classes = True

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {} if config.text_pair is None else {config.text_pair: "data.text_pair"}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The text (or the filled template), with ``labels`` a class number."""
        config = self.config
        pairs = None
        if config.text_pair is not None:
            pairs = [as_text(row[config.text_pair], config.text_pair, place(row)) for row in rows]
        examples = encode_texts(self.processor, self.texts(rows), pairs, [place(row) for row in rows], self.limit)
        for example, row in zip(examples, rows, strict=True):
            example["labels"] = self._number[row[config.label]]
        return examples

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Cross-entropy and hits."""
        return class_tally(logits, labels)
