"""A class for every word of a text: named entities, parts of speech."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexp.config import DataConfig
from flexp.data.columns import lists_of_labels
from flexp.data.measures import PREFIXES, class_scores, confusion, entities, entity_scores, prefix_of
from flexp.data.survey import Column, column_of
from flexp.data.tasks.base import Limit, SeveralLabels, class_details, place
from flexp.data.tasks.text import pad
from flexp.data.types import Batch, Example, Row, Tally
from flexp.errors import ConfigError, DataError
from flexp.kinds import IGNORED, ModelKind


class TokenClassification(SeveralLabels):
    """``data.text`` holds words and ``data.label`` a tag for each: lists, or text that spaces divide.

    The first token of a word has its tag, further ones have none. Words are joined by spaces and encoded as any text.
    With tags such as ``B-PER`` the metric is the F1 of whole entities, else accuracy.
    """

    name = "token-classification"
    model_kind: ModelKind = "token-classification"
    metric = "f1"

    @classmethod
    def suits(cls, columns: Sequence[Column]) -> dict[str, Any] | None:
        words = column_of(columns, "list", ("tokens", "words"))
        tags = column_of(columns, "list", ("ner_tags", "tags", "ner", "pos_tags", "labels", "label"))
        return None if words is None or tags is None else {"text": words, "label": tags}

    def __init__(self, config: DataConfig, processor: Any, limit: Limit, label_names: Sequence[str] = ()) -> None:
        super().__init__(config, processor, limit, label_names)
        if not getattr(processor, "is_fast", False):
            raise ConfigError("token classification needs a fast tokenizer, which knows where in the text a token is")
        marked = [name for name in label_names if prefix_of(name) and (name[1:2] == "-")]
        bare = {"B", "O"} <= {*label_names} <= {*PREFIXES, "O"}  # entities of one kind, which has no name
        self.entities = bare or any(name[0] in "BISU" for name in marked)
        self.metric = "f1" if self.entities else "accuracy"

    def doubts(self) -> list[str]:
        names = self.label_names
        outside = [name for name in names if prefix_of(name) is None and name != "O"]
        other = [name for name in names if _ALMOST.fullmatch(name)]
        if self.entities and outside:
            return [f"tags without a prefix such as B- or I- are outside of entities, like O: {', '.join(outside[:6])}"]
        if not self.entities and other:
            return [
                f"tags such as {other[0]!r} are taken as classes of words, so accuracy is told, of which most may be "
                "words outside; for the F1 of entities write B-KIND, I-KIND and O"
            ]
        return []

    @classmethod
    def text_columns(cls, config: DataConfig) -> list[str]:
        return [config.text]

    @classmethod
    def read_labels(
        cls, values: Sequence[Any], names: list[str] | None, config: DataConfig, place: Callable[[int], str]
    ) -> list[list[str]]:
        return lists_of_labels(values, names, config.label, None, place)

    @classmethod
    def no_label(cls, names: Sequence[str]) -> None:
        return None

    def classes_in(self, example: Example) -> list[str]:
        return [self.label_names[tag] for tag in example["labels"] if tag != IGNORED]

    def nothing_to_find(self, examples: Sequence[Example]) -> bool:
        return self.entities and not any(entities(self.classes_in(example)) for example in examples)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """The words' tokens, ``labels`` on the first token of each; ``words``: how many there are, cut ones too."""
        examples: list[Example] = []
        for row in rows:
            words, tags = words_of(row[self.config.text], place(row)), row[self.config.label]
            if tags is not None and len(tags) != len(words):
                raise DataError(
                    f"{place(row)}: {len(words)} words in column {self.config.text!r} and {len(tags)} tags in column "
                    f"{self.config.label!r}; each word needs one"
                )
            numbers = [0] * len(words) if tags is None else [self._number[tag] for tag in tags]
            examples.append(self._example(words, numbers, place(row)))
        return examples

    def _example(self, words: Sequence[str], tags: Sequence[int], where: str) -> Example:
        text, options = " ".join(words), {"return_offsets_mapping": True, "verbose": False}
        encoded = self.processor(text, **options)
        length, cut = len(encoded["input_ids"]), 0
        if length > self.limit.tokens:
            self.limit.refuse(length, where)
            cut = length - self.limit.tokens
            encoded = self.processor(text, truncation=True, max_length=self.limit.tokens, **options)
        ends = [end - 1 for end in accumulate(len(word) + 1 for word in words)]  # of each word in the text
        labels, tagged, last = [], [], -1
        for begin, end in encoded["offset_mapping"]:
            word = bisect_right(ends, begin) if end > begin else last  # special tokens are of no word
            labels.append(tags[word] if word > last else IGNORED)
            if word > last:
                tagged.append(word)
            last = max(word, last)
        if not any(label != IGNORED for label in labels):
            raise DataError(f"{where}: there is no word that the tokenizer knows; remove the row")
        keys = ("input_ids", "attention_mask", "token_type_ids")
        example: Example = {key: list(encoded[key]) for key in keys if key in encoded}
        example.setdefault("attention_mask", [1] * len(labels))
        # Of some words there is no token: invisible signs alone.
        skipped = {} if tagged == list(range(len(tagged))) else {"tagged": tagged}
        return example | {"labels": labels, "words": len(words)} | skipped | ({"cut": cut} if cut else {})

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A padded batch with ``labels`` (B, T)."""
        return pad(examples, self.processor)

    def measure(self, logits: Tensor, labels: Tensor, examples: Sequence[Example]) -> Tally:
        """Cross-entropies of the labelled tokens, summed over each example, and the tags given and right."""
        tally = Tally()
        for logits_TC, labels_T in zip(logits, labels.to(logits.device), strict=True):
            kept = labels_T != IGNORED
            logits_SC, right_S = logits_TC[kept].float(), labels_T[kept]
            tally.loss.append(float(F.cross_entropy(logits_SC, right_S, reduction="sum")))
            tally.items.append(len(right_S))
            tally.targets.append(right_S.tolist())
            tally.answers.append(torch.softmax(logits_SC, dim=-1).tolist())
        return tally

    def figures(self, tally: Tally) -> dict[str, Any]:
        """Over all words ``accuracy``, ``macro_f1`` and ``auc``; of entities ``f1``, ``precision`` and ``recall``, else
        ``majority``."""
        right, given = list(chain(*tally.targets)), list(chain(*tally.answers))
        hits = sum(answer == wanted for answer, wanted in zip(map(_likeliest, given), right, strict=True))
        scores = {"accuracy": hits / len(right), **class_scores(given, right)}
        if not self.entities:
            scores["majority"] = max(Counter(right).values()) / len(right)
        else:
            names = self.label_names
            mine = [[names[_likeliest(word)] for word in words] for words in tally.answers]
            scores |= entity_scores(mine, [[names[tag] for tag in tags] for tags in tally.targets])
        return scores

    def details(self, tally: Tally) -> dict[str, Any]:
        """``f1_by_class`` and the table of confusion, of words."""
        given = [_likeliest(word) for words in tally.answers for word in words]
        return class_details(self.label_names, confusion(list(chain(*tally.targets)), given, len(self.label_names)))

    def answer(self, logits: Tensor, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """A tag for each word; nothing for words that were cut off, or that the tokenizer has no token for."""
        found = []
        for tags_T, example in zip(logits.argmax(-1).tolist(), examples, strict=True):
            shift = len(tags_T) - len(example["labels"]) if self.processor.padding_side == "left" else 0
            places = [k + shift for k, label in enumerate(example["labels"]) if label != IGNORED]
            tags = [""] * example["words"]
            for word, k in zip(example.get("tagged", range(len(places))), places, strict=True):
                tags[word] = self.label_names[tags_T[k]]
            found.append({"predicted": tags})
        return found


_ALMOST = re.compile(r"[bisuel][-_].+|.+[-_][BISULE]|[BISU]_.+")
"""Tags of entities that are written otherwise."""


def words_of(value: Any, where: str) -> list[str]:
    """The words of a row: a list of them, or text that spaces divide.

    Raises:
        DataError: it is something else, or a word is empty.
    """
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise DataError(f"{where}: expected a list of words, or text that spaces divide; no word may be empty")
    return words


def _likeliest(probabilities: Sequence[float]) -> int:
    return max(range(len(probabilities)), key=probabilities.__getitem__)
