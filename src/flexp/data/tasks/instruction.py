"""Instruction tuning: a prompt and its answer, or a chat, with loss on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from flexp.config import DataConfig
from flexp.data.columns import as_text
from flexp.data.survey import Column, column_of
from flexp.data.tasks.base import place
from flexp.data.tasks.chat import ChatForm, messages_of
from flexp.data.tasks.text import TextTask, answer_example, continuation, fields, fill_row, fit_end, with_end
from flexp.data.types import Example, Row, Tally
from flexp.kinds import IGNORED

PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("answer", "response", "completion", "output", "reply")


class Instruction(TextTask):
    """``data.template`` makes the prompt; the answer column and the end-of-text token follow it.

    Where it is unset and the model has a chat template, that makes the text, of chats (``data.messages``) and of
    prompts with answers alike: what is trained is what ``flexp chat`` asks for.
    """

    name = "instruction"
    template = "### Instruction:\n{prompt}\n\n### Response:\n"

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        if (messages := column_of(columns, "chat")) is not None:
            return {"messages": messages}
        prompt, answer = column_of(columns, "text", PROMPTS), column_of(columns, "text", ANSWERS)
        return None if prompt is None or answer is None else {"prompt": prompt, "answer": answer}

    @classmethod
    def text_columns(cls, config: DataConfig) -> list[str]:
        return super().text_columns(config) if config.messages is None else [config.messages]

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {config.answer: "data.answer"} if config.messages is None else {config.messages: "data.messages"}

    @classmethod
    def chat_template(cls, config: DataConfig, own: bool) -> str | None:
        if own and config.template is None:
            return None
        template = config.template or cls.template
        names = fields(template)
        return template.replace("{" + names[0] + "}", "{prompt}") if len(names) == 1 else template

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Prompt + answer; where both are too long the prompt loses its beginning, so that the answer stays."""
        config = self.config
        if config.messages is not None:
            return self._chats(rows, config.messages)
        if config.template is None and getattr(self.processor, "chat_template", None):
            form = ChatForm(self.processor)
            return [example for row in rows for example in form.examples(self._turns(row), self.limit, place(row))]
        examples = []
        for row in rows:
            prompt = fill_row(config.template or self.template, config, row)
            answer = as_text(row[config.answer], config.answer, place(row)).strip()
            ids, start = continuation(self.processor, prompt, answer)
            ids = with_end(self.processor, ids)
            ids, start, cut = fit_end(self.processor, ids, start, self.limit, place(row))
            examples.append(answer_example(ids, range(start, len(ids)), cut, place(row)))
        return examples

    def _turns(self, row: Row) -> list[dict[str, str]]:
        """A prompt and its answer as a chat."""
        asked, answer = (as_text(row[name], name, place(row)) for name in (self.config.prompt, self.config.answer))
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer.strip()}]

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Losses, and whether the likeliest token is right everywhere in the answer: then greedy decoding writes it."""
        tally = super().measure(logits, labels, examples)
        for logits_TV, labels_T in zip(logits, labels.to(logits.device), strict=True):
            kept = labels_T[1:] != IGNORED
            tally.correct.append(bool((logits_TV[:-1][kept].argmax(-1) == labels_T[1:][kept]).all()))
        return tally

    def figures(self, tally: Tally) -> dict[str, Any]:
        """``perplexity``, ``tokens`` and ``exact_match``: the share of answers that greedy decoding writes."""
        exact = sum(tally.correct) / len(tally.correct)
        return super().figures(replace(tally, correct=[])) | {"exact_match": exact}

    def _chats(self, rows: Sequence[Row], column: str) -> list[Example]:
        own = bool(getattr(self.processor, "chat_template", None))
        form = ChatForm(self.processor, self.chat_template(self.config, own))
        form.check()
        return [
            example
            for row in rows
            for example in form.examples(messages_of(row[column], column, place(row)), self.limit, place(row))
        ]
