"""Instruction tuning: a prompt and its answer, with loss on the answer only."""

from __future__ import annotations

from collections.abc import Sequence

from flexp.config import DataConfig
from flexp.data.columns import as_text
from flexp.data.tasks.base import TextTask, fields, fill_row, place
from flexp.data.tasks.text import answer_example, continuation, fit_end, with_end
from flexp.data.types import Example, Row


class Instruction(TextTask):
    """``data.template`` makes the prompt; the answer column and the end-of-text token follow it."""

    name = "instruction"
    template = "### Instruction:\n{prompt}\n\n### Response:\n"

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {config.answer: "data.answer"}

    @classmethod
    def chat_prompt(cls, config: DataConfig) -> str | None:
        template = config.template or cls.template
        names = fields(template)
        return template.replace("{" + names[0] + "}", "{prompt}") if len(names) == 1 else None

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Prompt + answer; where both are too long the prompt loses its beginning, so that the answer stays."""
        config = self.config
        examples = []
        for row in rows:
            prompt = fill_row(config.template or self.template, config, row)
            answer = as_text(row[config.answer], config.answer, place(row)).strip()
            ids, start = continuation(self.processor, prompt, answer)
            ids = with_end(self.processor, ids)
            ids, start, cut = fit_end(self.processor, ids, start, self.limit, place(row))
            examples.append(answer_example(ids, range(start, len(ids)), cut, place(row)))
        return examples
