"""Questions whose answer is a span of a context, as in SQuAD (Rajpurkar et al., 2016, arXiv 1606.05250)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.config import DataConfig
from flexp.data.columns import as_text, missing
from flexp.data.measures import plain_words, words_in_common
from flexp.data.survey import Column, column_of
from flexp.data.tasks.base import BaseTask, Limit, place
from flexp.data.tasks.text import pad
from flexp.data.types import Batch, Example, Row, Tally
from flexp.errors import ConfigError, DataError
from flexp.kinds import ModelKind

OVERLAP = 3
"""Windows of a long context share one part in so many of their room."""
LEAST = 8
"""Tokens of the context that must have room beside the question."""

Span = tuple[int, int, str]
"""Where an answer begins and ends in its context, in characters, and its text."""


class QuestionAnswering(BaseTask):
    """``data.text`` names the column of contexts, ``data.prompt`` that of questions, ``data.answer`` that of answers.

    An answer is ``{"text": [...], "answer_start": [...]}`` as in SQuAD, a list of ``{"text", "answer_start"}``, or
    text, which is looked for in the context. The first one is learnt, and a score takes the best of them. A long
    context becomes several windows that overlap, each an example; one without the answer is labelled with its first
    token, as is a row without any answer (``data.unanswerable``).
    """

    name = "question-answering"
    model_kind: ModelKind = "question-answering"
    metric = "f1"
    higher_is_better = True
    answers = True

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        context, question = (
            column_of(columns, "text", names)
            for names in (("context", "passage", "paragraph"), ("question", "query", "prompt"))
        )
        names = ("answers", "answer", "answer_text")
        answer = column_of(columns, "other", names) or column_of(columns, "text", names)
        found = {"text": context, "prompt": question, "answer": answer}
        return None if None in found.values() else found

    def __init__(self, config: DataConfig, processor: Any, limit: Limit, label_names: Sequence[str] = ()) -> None:
        super().__init__(config, processor, limit, label_names)
        if not getattr(processor, "is_fast", False):
            raise ConfigError("question answering needs a fast tokenizer, which knows where in the text a token is")
        if config.template is not None:
            raise ConfigError("data.template is not for question-answering: a question and its context are two texts")

    @classmethod
    def text_columns(cls, config: DataConfig) -> list[str]:
        return [config.prompt, config.text]

    @classmethod
    def own_columns(cls, config: DataConfig) -> dict[str, str]:
        return {config.answer: "data.answer"}

    @classmethod
    def right_columns(cls, config: DataConfig) -> Collection[str]:
        return [config.answer]

    @classmethod
    def gaps(cls, config: DataConfig) -> Collection[str]:
        return [config.answer]  # said below, where it is known whether a row may have none

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """One example for each window. Besides tensors it has ``row`` (of which row it is), ``context``, ``offsets``
        (characters of each token of the context, None of others) and ``answers`` (texts)."""
        return [example for row in rows for example in self._windows(row)]

    def _windows(self, row: Row) -> Iterator[Example]:
        config, where = self.config, place(row)
        question = as_text(row[config.prompt], config.prompt, where).strip()
        context = as_text(row[config.text], config.text, where)
        known = config.answer in row  # nobody has them who asks
        spans = spans_of(row[config.answer], context, config.answer, where) if known else []
        if known and not spans and not config.unanswerable:
            raise DataError(
                f"{where}: the question has no answer (column {config.answer!r}); remove the row, or set "
                "data.unanswerable = true if a model is to learn that some have none"
            )
        used = len(self.processor(question, add_special_tokens=False, verbose=False)["input_ids"])
        used += self.processor.num_special_tokens_to_add(pair=True)
        room, whole = self.limit.tokens - used, len(self.processor(question, context, verbose=False)["input_ids"])
        if whole > self.limit.tokens:
            self.limit.refuse(whole, where)
            if room < LEAST:
                raise DataError(
                    f"{where}: the question has {used} tokens, so of the {self.limit.tokens} of an example {room} are "
                    "left for the context; shorten it, or raise data.max_length"
                )
        windows = self.processor(
            question,
            context,
            truncation="only_second",
            max_length=max(self.limit.tokens, used + 1),
            stride=max(room, 0) // OVERLAP if whole > self.limit.tokens else 0,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        key = hashlib.sha256(f"{where}\n{question}\n{context}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for index in range(len(windows["input_ids"])):
            ids = list(windows["input_ids"][index])
            of_text = windows.sequence_ids(index)
            offsets = [
                tuple(pair) if which == 1 else None
                for pair, which in zip(windows["offset_mapping"][index], of_text, strict=True)
            ]
            nothing = self._nothing(ids)
            start, end = _tokens_of(spans[0], offsets) or (nothing, nothing) if spans else (nothing, nothing)
            tensors = {k: list(windows[k][index]) for k in ("attention_mask", "token_type_ids") if k in windows}
            yield {
                "input_ids": ids,
                **tensors,
                "start_positions": start,
                "end_positions": end,
                "row": key,
                "context": context,
                "offsets": offsets,
                "answers": [text for *_, text in spans] or [""],
            }

    def _nothing(self, ids: Sequence[int]) -> int:
        """The place that stands for no answer: the classifier's token, or the first one."""
        return ids.index(self.processor.cls_token_id) if self.processor.cls_token_id in ids else 0

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A padded batch with ``start_positions`` and ``end_positions`` (B,)."""
        batch = pad(examples, self.processor)
        length = batch["input_ids"].shape[1]
        left = self.processor.padding_side == "left"
        for name in ("start_positions", "end_positions"):
            places = [e[name] + (length - len(e["input_ids"]) if left else 0) for e in examples]
            batch[name] = torch.tensor(places)
        return batch

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """The mean cross-entropy of both ends over all tokens of the batch, padding included, as transformers has it;
        and what each window answers."""
        tally = Tally()
        for logits_T2, ends_2, example in zip(logits.float(), labels.to(logits.device), examples, strict=True):
            tally.loss.append(float(F.cross_entropy(logits_T2.T, ends_2)))
            tally.items.append(1)
            tally.targets.append(example["answers"])
            tally.answers.append(self._answer(logits_T2, example))
        return tally

    def figures(self, tally: Tally) -> dict[str, Any]:
        """``f1`` of words and ``exact_match``, as SQuAD's evaluation defines them: means over questions."""
        right = {answer["row"]: golds for answer, golds in zip(tally.answers, tally.targets, strict=True)}
        given = self._merged(tally.answers)
        return {
            "f1": sum(max(words_in_common(given[row], gold) for gold in right[row]) for row in right) / len(right),
            "exact_match": sum(
                any(plain_words(given[row]) == plain_words(gold) for gold in right[row]) for row in right
            ) / len(right),
            "questions": len(right),
        }  # fmt: skip

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """What each window answers; :meth:`by_row` chooses."""
        return [self._answer(logits_T2, example) for logits_T2, example in zip(logits.float(), examples, strict=True)]

    def by_row(self, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answer to each question, the best of its windows."""
        return [{"predicted": text} for text in self._merged(found).values()]

    def _answer(self, logits_T2: Tensor, example: Example) -> dict[str, Any]:
        """The span of the context with the greatest sum of logits, and how likely there is none."""
        offsets = example["offsets"]
        shift = len(logits_T2) - len(offsets) if self.processor.padding_side == "left" else 0
        inside = [k for k, pair in enumerate(offsets) if pair is not None]
        places = torch.tensor(inside, device=logits_T2.device) + shift
        starts_S, ends_S = logits_T2[places].unbind(-1)
        sums_SS = (starts_S[:, None] + ends_S[None, :]).masked_fill(
            torch.ones(len(inside), len(inside), dtype=torch.bool, device=places.device).tril(-1), -torch.inf
        )
        best, nothing = int(sums_SS.argmax()), shift + self._nothing(example["input_ids"])
        start, end = inside[best // len(inside)], inside[best % len(inside)]
        text = example["context"][offsets[start][0] : offsets[end][1]]
        score, none = float(sums_SS.flatten()[best]), float(logits_T2[nothing].sum())
        return {"row": example["row"], "predicted": text, "score": score, "none": none}

    def _merged(self, found: Sequence[dict[str, Any]]) -> dict[str, str]:
        """The answer to each question by its row, in their order; empty where nothing is likelier than any span."""
        windows: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for one in found:
            windows[one["row"]].append(one)
        merged = {}
        for row, some in windows.items():
            best = max(some, key=lambda one: one["score"])
            none = self.config.unanswerable and min(one["none"] for one in some) > best["score"]
            merged[row] = "" if none else best["predicted"]
        return merged


def spans_of(value: Any, context: str, column: str, where: str) -> list[Span]:
    """A row's answers in its context; none where the row has none.

    Raises:
        DataError: an answer is not in the context, or not where it is said to be.
    """
    if missing(value):
        return []
    if odd := next((one for one in (value if isinstance(value, list) else [value])
                    if isinstance(one, dict) and "text" not in one), None):  # fmt: skip
        raise DataError(
            f"{where}: column {column!r} holds {', '.join(map(repr, odd))}; expected an answer's 'text' and, where "
            "it is known, 'answer_start'"
        )
    if isinstance(value, dict):
        texts, starts = value.get("text") or [], value.get("answer_start") or []
        pairs = [(texts, starts)] if isinstance(texts, str) else list(zip(texts, starts, strict=False))
        if not isinstance(texts, str) and len(texts) != len(starts):
            raise DataError(f"{where}: column {column!r} has {len(texts)} answers and {len(starts)} places")
    elif isinstance(value, list):
        pairs = [(one["text"], one.get("answer_start")) if isinstance(one, dict) else (one, None) for one in value]
    else:
        pairs = [(value, None)]
    return [_span(text, start, context, column, where) for text, start in pairs]


def _span(text: Any, start: Any, context: str, column: str, where: str) -> Span:
    text = as_text(text, column, where)
    try:
        begin = context.find(text) if start is None or start == [] else int(start)
    except (TypeError, ValueError):
        begin = -1
    if begin < 0 or context[begin : begin + len(text)] != text or not text.strip():
        at = "" if start is None or start == [] else f" at character {start}"
        raise DataError(
            f"{where}: the answer {text[:40]!r} in column {column!r} is not in the context{at}; write it as it stands "
            "there (answer_start counts characters from 0)"
        )
    return begin, begin + len(text), text


def _tokens_of(span: Span, offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
    """The first and the last token of a span; ``None``: it is not whole in this window."""
    begin, end, _ = span
    inside = [(k, pair) for k, pair in enumerate(offsets) if pair is not None and pair[0] < pair[1]]
    if not inside or inside[0][1][0] > begin or inside[-1][1][1] < end:
        return None
    first = max((k for k, pair in inside if pair[0] <= begin), default=None)
    last = min((k for k, pair in inside if pair[1] >= end), default=None)
    return None if first is None or last is None or last < first else (first, last)
