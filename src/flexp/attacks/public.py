"""Public text: what an attacker learns from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexp.attacks.base import Public, Sent
from flexp.data.types import Example
from flexp.errors import DataError
from flexp.models.stage import Stage

BATCH = 16
LONGEST = 64
"""Tokens of a public text."""
STOP = 100
"""So many of the public text's most frequent tokens are no content words; of a small vocabulary, a twentieth of it."""
MANUAL = "the Python manual in this installation, and every token of the vocabulary in random order"


def paragraphs(file: Path | None, most: int) -> list[str]:
    """Public texts: the lines of ``file``, or paragraphs of the manual that comes with Python, in random order.

    Raises:
        DataError: the file cannot be read, or holds no text.
    """
    if file is None:
        from pydoc_data.topics import topics

        found = [part for text in topics.values() for part in re.split(r"\n\s*\n", text)]
    else:
        try:
            found = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as text ({error}); expected UTF-8, one text a line") from error
    texts = [" ".join(part.split()) for part in found]
    texts = [text for text in texts if len(text) > 20]
    if not texts:
        raise DataError(f"{file}: no line has more than 20 letters; expected one public text a line")
    order = np.random.default_rng(0).permutation(len(texts))[:most]
    return [texts[number] for number in order]


def encoded(tokenizer: Any, texts: Sequence[str], *, passes: int) -> list[Example]:
    """The texts as token ids, and texts of random tokens, in which every token stands ``passes`` times."""
    examples = [{"input_ids": ids} for ids in tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"]]
    special, draw = set(tokenizer.all_special_ids), np.random.default_rng(0)
    words = np.array([token for token in range(len(tokenizer)) if token not in special])
    before, after = _around(tokenizer)
    length = LONGEST // 2
    flat = np.concatenate([draw.permutation(words) for _ in range(passes)] or [words[:0]])
    for start in range(0, len(flat), length):
        examples.append({"input_ids": [*before, *flat[start : start + length].tolist(), *after]})
    return [example for example in examples if example["input_ids"]]


def known_to_all(stage: Stage, depth: int, examples: Sequence[Example]) -> Public:
    """What the head of ``stage`` sends for public examples, without dropout."""
    stage.model.eval()
    hiddens, masks, ids = [], [], []
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))  # so that little is padding
    for start in range(0, len(ordered), BATCH):
        rows = [example["input_ids"] for example in ordered[start : start + BATCH]]
        ids_BT, mask_BT = padded(rows, stage.model.device)
        with torch.no_grad():
            hidden_BTH, plan = stage.plan({"input_ids": ids_BT, "attention_mask": mask_BT})
            hiddens.append(stage.run(hidden_BTH, plan, 0, depth).cpu())
        masks.append(mask_BT.bool().cpu())
        ids.append(ids_BT[mask_BT.bool()].cpu())
    return Public(stage, depth, Sent.of(hiddens, masks), torch.cat(ids))


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T), padded on the right."""
    rows = [torch.tensor(ids, device=device) for ids in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True)


def pooled(hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over each text's tokens, (B, H)."""
    weights = mask_BT.unsqueeze(-1).to(hidden_BTH.dtype)
    return (hidden_BTH * weights).sum(1) / weights.sum(1).clamp_min(1)


def dull_tokens(known: Public, special: Collection[int]) -> Tensor:
    """Tokens that are no content words: special ones, and the most frequent of the public text."""
    stop = min(STOP, len(known.embeddings) // 20)
    frequent = [token for token, _ in Counter(known.ids_N.tolist()).most_common(stop)]
    return torch.tensor(sorted({*special, *frequent}))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a text begins and ends with."""
    ids, special = tokenizer("a")["input_ids"], set(tokenizer.all_special_ids)
    inside = [place for place, token in enumerate(ids) if token not in special]
    return (ids[: inside[0]], ids[inside[-1] + 1 :]) if inside else (ids, [])
