"""The parts of a task that most of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flexp.config import DataConfig
from flexp.data.columns import as_text
from flexp.data.tasks.measures import token_tally
from flexp.data.tasks.text import Limit, pad
from flexp.data.templates import fields, fill
from flexp.data.types import PLACE, Batch, Example, Forward, ModelKind, Row, Tally


class TextTask:
    """A task on a causal language model, scored by perplexity: what causal-lm and instruction are."""

    name: str
    model_kind: ModelKind = "causal-lm"
    metric: str = "perplexity"
    higher_is_better: bool = False
    label_names: list[str] | None = None

    def __init__(self, config: DataConfig, tokenizer: Any, limit: Limit) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.limit = limit

    def collate(self, examples: Sequence[Example]) -> Batch:
        """``input_ids``, ``attention_mask``, ``labels`` (B, T), and ``token_type_ids`` if the tokenizer gives them."""
        return pad(examples, self.tokenizer)

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Next-token losses."""
        return token_tally(logits, labels)

    def score(self, forward: Forward, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Nothing further."""
        return {}


def roles(config: DataConfig) -> dict[str, str]:
    """Names that a template may use besides the columns' own: the configuration's key for a column."""
    return {"text": config.text, "prompt": config.prompt, "answer": config.answer}


def template_columns(template: str, config: DataConfig, own: Sequence[str] = ()) -> list[str]:
    """The columns that ``template`` needs; the fields in ``own`` are made by the task itself."""
    return [roles(config).get(name, name) for name in fields(template) if name not in own]


def fill_row(template: str, config: DataConfig, row: Row, own: dict[str, str] | None = None) -> str:
    """``template`` filled from a row, and from the fields that the task makes itself."""
    own = own or {}
    values = dict(own)
    for name in fields(template):
        if name not in own:
            column = roles(config).get(name, name)
            values[name] = as_text(row[column], column, place(row))
    return fill(template, values)


def place(row: Row) -> str:
    """Where a row stands, for messages."""
    return str(row.get(PLACE, "a row"))
