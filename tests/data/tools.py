"""A word-level tokenizer and small files, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SENTENCE = "the a red blue green dog cat bird runs sleeps eats fast slowly now Answer : . A B C D what is it ? # Q"
WORDS = SENTENCE.split()


def tokenizer(bert: bool = False, **settings: Any) -> PreTrainedTokenizerFast:
    """Words and signs are tokens. A decoder's tokenizer has ``[EOS]`` only; BERT's has CLS, SEP, PAD and types."""
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"] if bert else ["[UNK]", "[EOS]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS, *(f"w{k}" for k in range(40))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if bert:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        settings |= {
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        }
    else:
        settings = {"eos_token": "[EOS]", "model_input_names": ["input_ids", "attention_mask"]} | settings
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **settings)


def jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write ``rows`` one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(
    count: int, clients: tuple[str, ...] = ("north", "south"), labels: tuple[str, ...] = ("no", "yes")
) -> list[dict[str, Any]]:
    """Rows with distinct texts; labels alternate within each client."""
    return [
        {
            "text": f"the w{k % 40} dog w{k // 40 % 40} runs",
            "label": labels[k // len(clients) % len(labels)],
            "client": clients[k % len(clients)],
        }
        for k in range(count)
    ]
