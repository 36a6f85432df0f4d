"""What all text tasks share: templates with ``{column}`` fields, tokenising within a limit, joining a prompt with its
answer, padding, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.config import DataConfig
from flexp.data.columns import as_text
from flexp.data.tasks.base import BaseTask, Limit, place
from flexp.data.types import Batch, Example, Row, Tally
from flexp.errors import ConfigError, DataError
from flexp.kinds import IGNORED

_PADDED = ("input_ids", "attention_mask", "token_type_ids", "labels")


class TextTask(BaseTask):
    """A task on a causal language model, scored by perplexity: what causal-lm and instruction are.

    Attributes:
        template: of the input, where the configuration has none.
        made: fields of the template that the task itself makes.
    """

    template: ClassVar[str] = "{text}"
    made: ClassVar[Sequence[str]] = ()

    @classmethod
    def text_columns(cls, config: DataConfig) -> list[str]:
        return template_columns(config.template or cls.template, config, own=cls.made)

    def texts(self, rows: Sequence[Row]) -> list[str]:
        """The rows' input: the filled template, or without one the text column."""
        template, column = self.config.template, self.config.text
        if template is not None:
            return [fill_row(template, self.config, row) for row in rows]
        return [as_text(row[column], column, place(row)) for row in rows]

    def inputs(self, rows: Sequence[Row]) -> list[Example]:
        """The rows' texts, or pairs of texts (``data.text_pair``), encoded."""
        other, places = self.config.text_pair, [place(row) for row in rows]
        pairs = None if other is None else [as_text(row[other], other, place(row)) for row in rows]
        return encode_texts(self.processor, self.texts(rows), pairs, places, self.limit)

    def with_floats(self, examples: Sequence[Example]) -> Batch:
        """A padded batch whose ``labels`` are numbers of the examples as wholes."""
        batch = pad([{key: value for key, value in e.items() if key != "labels"} for e in examples], self.processor)
        return batch | {"labels": torch.tensor([example["labels"] for example in examples], dtype=torch.float32)}

    def collate(self, examples: Sequence[Example]) -> Batch:
        """``input_ids``, ``attention_mask``, ``labels`` (B, T), and ``token_type_ids`` if the tokenizer gives them."""
        return pad(examples, self.processor)

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Next-token losses."""
        return token_tally(logits, labels)


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
    for index, where in enumerate(places):
        example: Example = {key: list(encoded[key][index]) for key in keys}
        length = len(example["input_ids"])
        if length > limit.tokens:
            limit.refuse(length, where)
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


def token_tally(logits_BTV: Tensor, labels_BT: Tensor) -> Tally:
    """Next-token cross-entropy, summed over each example's labelled tokens. ``labels`` are not shifted."""
    labels_BS = labels_BT[:, 1:].to(logits_BTV.device)
    losses, items = [], []
    for logits_TV, labels_S in zip(logits_BTV, labels_BS, strict=True):  # one by one: float32 of a batch is large
        kept = labels_S != IGNORED
        losses.append(F.cross_entropy(logits_TV[:-1][kept].float(), labels_S[kept], reduction="sum"))
        items.append(kept.sum())
    return Tally(loss=torch.stack(losses).tolist(), items=torch.stack(items).tolist())


def deciding_logits(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The logits, shape (B, V), from which each example's only labelled token is predicted."""
    position_B = (labels_BT != IGNORED).int().argmax(-1).to(logits_BTV.device) - 1
    return logits_BTV[torch.arange(len(position_B), device=logits_BTV.device), position_B].float()


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


def fields(template: str) -> list[str]:
    """The names of the fields of ``template``, each once, in order. ``{{`` and ``}}`` stand for braces.

    Raises:
        ConfigError: braces do not match, or a field is more than a plain name.
    """
    names: dict[str, None] = {}
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.template: {error} in {template!r}; write {{column}} for a column and {{{{ or }}}} for a brace"
        ) from error
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name or spec or conversion or any(sign in name for sign in ".["):
            raise ConfigError(
                f"data.template: the field {{{name}}} in {template!r} must be a plain column name, like {{text}}"
            )
        names[name] = None
    return list(names)


def fill(template: str, values: Mapping[str, str]) -> str:
    """``template`` with its fields replaced; braces inside the values are kept as they are."""
    return "".join(
        literal + (values[name] if name is not None else "") for literal, name, _, _ in Formatter().parse(template)
    )


def _open_ended(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    return list(encoded["input_ids"][: _without_closing(encoded["special_tokens_mask"])])


def _without_closing(special: Sequence[int]) -> int:
    stop = len(special)
    while stop > 1 and special[stop - 1]:
        stop -= 1
    return stop
