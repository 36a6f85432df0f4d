"""Plain language modelling: predict every next token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from flexp.data.survey import Column, text_column
from flexp.data.tasks.base import place
from flexp.data.tasks.text import TextTask, answer_example, encode_texts, with_end
from flexp.data.types import Example, Row
from flexp.errors import DataError


class CausalLM(TextTask):
    """One example per text; or, with ``block_length``, the texts joined and cut in blocks of that many tokens."""

    name = "causal-lm"

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        text = text_column(columns)
        return None if text is None else {"text": text}

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Token ids closed by the end-of-text token, all labelled but the first; the last block may be shorter."""
        texts = self.texts(rows)
        if (length := self.config.block_length) is not None:
            return self._blocks(texts, length)
        places = [place(row) for row in rows]
        examples = []
        for plain, where in zip(encode_texts(self.processor, texts, None, places, self.limit), places, strict=True):
            ids = plain["input_ids"]
            if "cut" not in plain:
                ids = with_end(self.processor, ids)[: self.limit.tokens]
            if len(ids) < 2:
                raise DataError(
                    f"{where}: the text is a single token, so there is nothing to predict; remove the row, or join "
                    "short texts with data.block_length"
                )
            examples.append(answer_example(ids, range(len(ids)), plain.get("cut", 0)))
        return examples

    def _blocks(self, texts: list[str], length: int) -> list[Example]:
        if not texts:
            return []
        encoded = self.processor(texts, verbose=False)["input_ids"]
        stream = list(chain.from_iterable(with_end(self.processor, list(ids)) for ids in encoded))
        blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
        return [answer_example(block, range(len(block))) for block in blocks if len(block) > 1]
