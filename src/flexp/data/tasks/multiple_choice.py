"""Questions with lettered choices, answered by a language model.

Training and the main score look at the letter: the logits of the choice letters where the answer belongs. The cloze
score asks instead which choice *text* the model finds likeliest after the question alone, per token
(length-normalised, as in Brown et al., 2020, arXiv 2005.14165); models too small to use letters still score there.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from flexp.config import DataConfig
from flexp.data.columns import as_text, missing
from flexp.data.scores import scored
from flexp.data.survey import Column, column_of, label_column, text_column
from flexp.data.tasks.base import Limit, place
from flexp.data.tasks.text import (
    TextTask,
    answer_example,
    continuation,
    deciding_logits,
    fill_row,
    fit_end,
    prompt_ids,
    token_tally,
)
from flexp.data.types import Example, Forward, Row, Tally
from flexp.errors import ConfigError, DataError

LETTERS = string.ascii_uppercase

ENOUGH = 20
"""Rows of which it would be odd if one choice were never right."""


class MultipleChoice(TextTask):
    """Loss on the letter of the right choice only. ``{choices}`` in the template stands for the lettered choices."""

    name = "multiple-choice"
    metric = "accuracy"
    higher_is_better = True
    labelled = True
    template = "{prompt}\n{choices}\nAnswer:"
    made = ("choices",)

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        choices = column_of(columns, "list", ("choices", "options", "endings"))
        prompt, label = text_column(columns, ("prompt", "question", "ctx")), label_column(columns, ("label", "answer"))
        found = {"prompt": prompt, "choices": choices, "label": label}
        return None if None in found.values() else found

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        names = [config.choices] if isinstance(config.choices, str) else config.choices
        return dict.fromkeys(names, "data.choices")

    @classmethod
    def gaps(cls, config: DataConfig) -> Collection[str]:
        return () if isinstance(config.choices, str) else config.choices  # rows may have fewer choices than columns

    def __init__(self, config: DataConfig, processor: Any, limit: Limit, label_names: Sequence[str] = ()) -> None:
        super().__init__(config, processor, limit, label_names)
        self.wording = config.template or self.template
        if "{choices}" not in self.wording:
            raise ConfigError(
                "data.template of a multiple-choice task must have the field {choices}, where the lettered choices go"
            )
        self._before, self.letter_ids = _letters(processor, self.wording)
        self._given: Counter[str] = Counter()  # the answers as they are written

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Question, lettered choices, ``Answer:`` and the right letter.

        Besides the tensors an example has ``answer`` (number of the right choice), ``options`` (texts of the
        choices) and ``question`` (the text they complete in cloze scoring).
        """
        examples = []
        for row in rows:
            options = choices_of(row, self.config)
            letters = set(self.letter_ids[: len(options)]) - {self.processor.unk_token_id}
            if len(letters) < len(options):
                raise DataError(
                    f"{place(row)}: the tokenizer has no {len(options)} different tokens for the letters A to "
                    f"{LETTERS[len(options) - 1]}; use a tokenizer that knows them"
                )
            answer = answer_of(row, self.config, len(options))
            self._given[str(row[self.config.label]).strip()] += 1
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
            ids = prompt_ids(self.processor, self._prompt(row, self.wording, listed)) + self._before
            ids = [*ids, self.letter_ids[answer]]
            ids, start, cut = fit_end(self.processor, ids, len(ids) - 1, self.limit, place(row))
            example = answer_example(ids, [start], cut, place(row))
            bare = "\n".join(line for line in self.wording.split("\n") if line.strip() != "{choices}")
            example |= {"answer": answer, "options": options, "question": self._prompt(row, bare, "")}
            examples.append(example)
        return examples

    def doubts(self) -> list[str]:
        numbers = [text for text in self._given if text.isdecimal()]
        letters = [text for text in self._given if not text.isdecimal()]
        if numbers and letters:
            return [
                f"right choices are named by letters ({letters[0]} …) in some rows and by numbers ({numbers[0]} …) in "
                "others, where 0 is taken for A: if the data count from 1, write all in one way"
            ]
        if numbers and "0" not in numbers and self._given.total() >= ENOUGH:
            return ["the first choice, number 0, is never right: if the data count from 1, each answer is one too far"]
        return []

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """The letter's loss over the whole vocabulary; a hit is the likeliest letter among the example's own."""
        tally = token_tally(logits, labels)
        at_answer_BV = deciding_logits(logits, labels)
        for logits_V, example in zip(at_answer_BV, examples, strict=True):
            letters = torch.tensor(self.letter_ids[: len(example["options"])], device=logits_V.device)
            tally.correct.append(int(logits_V[letters].argmax()) == example["answer"])
            tally.targets.append(example["answer"])
        return tally

    def score(self, forward: Forward, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """``cloze_accuracy``: how often the right choice has the greatest log-likelihood per token; NaN if the model
        does not answer with finite numbers."""
        rows: list[Example] = []
        for example in examples:
            for option in example["options"]:
                ids, start = continuation(self.processor, example["question"], option)
                ids, start, _ = fit_end(self.processor, ids, start, Limit(self.limit.tokens), "")
                rows.append(answer_example(ids, range(start, len(ids))))
        tally = scored(forward, self.collate, lambda logits, labels, _: token_tally(logits, labels), rows, batch_size)
        if tally.broken:
            return {"cloze_accuracy": math.nan}
        per_token = [loss / max(items, 1) for loss, items in zip(tally.loss, tally.items, strict=True)]
        hits = offset = 0
        for example in examples:
            mine = per_token[offset : offset + len(example["options"])]
            offset += len(mine)
            hits += mine.index(min(mine)) == example["answer"]
        return {"cloze_accuracy": hits / len(examples)}

    def _prompt(self, row: Row, template: str, listed: str) -> str:
        return fill_row(template, self.config, row, {"choices": listed}).rstrip(" ")


def choices_of(row: Row, config: DataConfig) -> list[str]:
    """The texts of a row's choices.

    Raises:
        DataError: there are fewer than two or more than 26.
    """
    if isinstance(config.choices, str):
        values, column = row[config.choices], config.choices
        if not isinstance(values, list):
            raise DataError(
                f"{place(row)}: the column {column!r} holds a {type(values).__name__}, but a list of choices was "
                "expected; for one column per choice set data.choices to the list of their names"
            )
    else:
        values, column = [row[name] for name in config.choices], ", ".join(config.choices)
        while values and missing(values[-1]):  # rows may have fewer choices than there are columns
            values.pop()
    options = [as_text(value, column, place(row)).strip() for value in values if not missing(value)]
    if not 2 <= len(options) <= len(LETTERS) or len(options) < len(values):
        raise DataError(
            f"{place(row)}: {column!r} gives {len(options)} choices"
            + (f" and {len(values) - len(options)} empty ones" if len(options) < len(values) else "")
            + "; between 2 and 26 without gaps were expected"
        )
    return options


def answer_of(row: Row, config: DataConfig, count: int) -> int:
    """The number of the right choice, from a number (0 is the first) or a letter.

    Raises:
        DataError: it is neither, or there is no such choice.
    """
    value = row[config.label]
    text = str(value).strip()
    if len(text) == 1 and text.upper() in LETTERS:
        number = LETTERS.index(text.upper())
    elif text.isdecimal():
        number = int(text)
    else:
        number = -1
    if not 0 <= number < count:
        raise DataError(
            f"{place(row)}: the answer {text[:40]!r} in column {config.label!r} is none of the {count} choices; "
            f"expected a number from 0 to {count - 1} or a letter from A to {LETTERS[count - 1]}"
        )
    return number


def _letters(tokenizer: Any, template: str) -> tuple[list[int], list[int]]:
    """Tokens that come before any letter after the template's end (usually none), and the token of each letter."""
    tail = template[template.rindex("}") + 1 :].rstrip(" ")
    tokens = []
    for letter in LETTERS:
        ids, start = continuation(tokenizer, tail, letter)
        tokens.append(ids[start:])
    shared = 0
    while shared < min(len(tokens[0]), len(tokens[1])) - 1 and tokens[0][shared] == tokens[1][shared]:
        shared += 1
    return tokens[0][:shared], [ids[min(shared, len(ids) - 1)] for ids in tokens]
