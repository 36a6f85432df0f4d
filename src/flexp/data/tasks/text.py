"""What all text tasks share: tokenising within a limit, joining a prompt with its answer, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexp.data.types import Example
from flexp.errors import DataError

IGNORED = -100
"""A label without loss."""

_PADDED = ("input_ids", "attention_mask", "token_type_ids", "labels")


@dataclass(frozen=True)
class Limit:
    """How long a text may be, in tokens, and what happens to longer ones."""

    tokens: int
    long_texts: Literal["truncate", "error"] = "truncate"
    of_model: bool = False  # the model's positions, not data.max_length, set it

    def refuse(self, length: int, place: str) -> None:
        """Complain about a text of ``length`` tokens unless it may be cut.

        Raises:
            DataError: texts that are too long are errors.
        """
        if self.long_texts == "truncate":
            return
        what = "the model's positions" if self.of_model else "data.max_length"
        mend = "" if self.of_model else "raise data.max_length, "
        raise DataError(
            f"{place}: the text has {length} tokens, more than the {self.tokens} of {what}; "
            f'shorten it, {mend}or set data.long_texts = "truncate"'
        )


def pad_id(tokenizer: Any) -> int:
    """The token that fills up batches: the tokenizer's own, else its end-of-text token.

    Models that look for padding themselves (decoders that classify) need it as ``config.pad_token_id``.

    Raises:
        DataError: the tokenizer has neither.
    """
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise DataError(
            "the tokenizer has neither a padding nor an end-of-text token; set pad_token in its tokenizer_config.json"
        )
    return int(token)


def encode_texts(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, places: Sequence[str], limit: Limit
) -> list[Example]:
    """Encode texts (or pairs of texts) as the tokenizer does; ``cut`` says how many tokens were cut off one."""
    if not texts:
        return []
    second = [] if pairs is None else [list(pairs)]
    encoded = tokenizer(list(texts), *second, verbose=False)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded]
    examples: list[Example] = []
    for index, place in enumerate(places):
        example: Example = {key: list(encoded[key][index]) for key in keys}
        length = len(example["input_ids"])
        if length > limit.tokens:
            limit.refuse(length, place)
            one = [texts[index]] + ([] if pairs is None else [pairs[index]])
            shorter = tokenizer(*one, truncation=True, max_length=limit.tokens, verbose=False)
            example = {key: list(shorter[key])[: limit.tokens] for key in keys}
            example["cut"] = length - limit.tokens
        example.setdefault("attention_mask", [1] * len(example["input_ids"]))
        examples.append(example)
    return examples


def continuation(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of ``prompt`` followed by ``answer``, and where the answer's tokens begin.

    Both are tokenised together, so that the tokens are those that the model knows; a token across the border
    belongs to the answer. Closing special tokens are left off. A space is put between them unless there is one.
    """
    if prompt and not prompt[-1].isspace():
        answer = " " + answer
    if not getattr(tokenizer, "is_fast", False):
        ids = _open_ended(tokenizer, prompt + answer)
        before = _open_ended(tokenizer, prompt)
        same = (k for k, (x, y) in enumerate(zip(ids, before, strict=False)) if x != y)
        return ids, next(same, min(len(ids), len(before)))
    encoded = tokenizer(prompt + answer, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    stop = _without_closing(encoded["special_tokens_mask"])
    ends = [end for _, end in encoded["offset_mapping"][:stop]]
    start = next((k for k, end in enumerate(ends) if end > len(prompt)), stop)
    return list(encoded["input_ids"][:stop]), start


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a text that is to be continued: with opening special tokens, without closing ones."""
    return _open_ended(tokenizer, prompt)


def opening_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before any text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    mask = encoded["special_tokens_mask"]
    return list(encoded["input_ids"][: next((at for at, special in enumerate(mask) if not special), 0)])


def with_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """``ids`` closed by the end-of-text token, if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, int(end)]


def fit_end(tokenizer: Any, ids: list[int], start: int, limit: Limit, place: str) -> tuple[list[int], int, int]:
    """Shorten prompt + answer so that the answer (from ``start``) survives: the prompt loses its beginning.

    Returns the ids, the answer's new start and the number of tokens cut. An opening special token is kept. If the
    answer alone is too long it loses its end.
    """
    positions, start, cut = kept(tokenizer, ids, start, limit, place)
    return [ids[at] for at in positions], start, cut


def kept(tokenizer: Any, ids: list[int], start: int, limit: Limit, place: str) -> tuple[Sequence[int], int, int]:
    """:func:`fit_end`, with the positions of the tokens that stay instead of the tokens."""
    cut, every = len(ids) - limit.tokens, range(len(ids))
    if cut <= 0:
        return every, start, 0
    limit.refuse(len(ids), place)
    keep = 1 if start > 0 and ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else 0
    room = limit.tokens - (len(ids) - start)
    front = max(min(start, room), min(start, 1))  # one token at least: what has no context cannot be predicted
    head = [*every[:keep], *every[start - (front - keep) : start]]
    return [*head, *every[start:]][: limit.tokens], len(head), cut


def answer_example(ids: list[int], labelled: Sequence[int], cut: int = 0, place: str | None = None) -> Example:
    """A causal example with loss at the positions ``labelled`` only; the first token never has any.

    Raises:
        DataError: nothing is left to learn; only with the ``place`` that the message is to name.
    """
    wanted = {position for position in labelled if 0 < position < len(ids)}
    if place is not None and not wanted:
        raise DataError(f"{place}: no token of the answer is left to predict; raise data.max_length, or fill it in")
    labels = [token if index in wanted else IGNORED for index, token in enumerate(ids)]
    example: Example = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
    if cut:
        example["cut"] = cut
    return example


def pad(examples: Sequence[Example], tokenizer: Any) -> dict[str, Tensor]:
    """A batch as long as its longest example, padded on the tokenizer's side; scalar labels become shape (B,)."""
    length = max(len(example["input_ids"]) for example in examples)
    left = tokenizer.padding_side == "left"
    fill = {
        "input_ids": pad_id(tokenizer),
        "attention_mask": 0,
        "token_type_ids": int(getattr(tokenizer, "pad_token_type_id", 0) or 0),
        "labels": IGNORED,
    }
    batch: dict[str, Tensor] = {}
    for key in _PADDED:
        if key not in examples[0]:
            continue
        values = [example[key] for example in examples]
        if isinstance(values[0], list):
            gaps = [[fill[key]] * (length - len(value)) for value in values]
            values = [g + v if left else v + g for g, v in zip(gaps, values, strict=True)]
        batch[key] = torch.tensor(values, dtype=torch.long)
    return batch


def _open_ended(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    return list(encoded["input_ids"][: _without_closing(encoded["special_tokens_mask"])])


def _without_closing(special: Sequence[int]) -> int:
    stop = len(special)
    while stop > 1 and special[stop - 1]:
        stop -= 1
    return stop
