"""A run that any machine can do in seconds: a tiny classifier with dropout, random words, three clients."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flexp.config import RunConfig
from flexp.config.loading import validate
from flexp.models.zoo import save_tiny, set_dropout

CLIENTS = ("north", "south", "west")
CUTS = [[1, 4], [2, None], [3, 4]]
WORDS = [f"word{number}" for number in range(40)]


def tiny_run(
    folder: Path, *, rounds: int, steps_per_round: int, dropout: float = 0.1, in_flight: int = 1, seed: int = 0
) -> RunConfig:
    """Write model, tokenizer and data into ``folder``; give a configuration that uses them."""
    model = folder / "model"
    save_tiny("bert", model)
    _set_dropout(model, dropout)
    _tokenizer().save_pretrained(model)
    rows = folder / "rows.csv"
    draw = random.Random(seed)
    with rows.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ("client", "text", "label"))
        table.writeheader()
        for number in range(40 * len(CLIENTS)):
            label = draw.randrange(2)
            words = draw.choices(WORDS[20 * label :], k=8)
            client = CLIENTS[number % len(CLIENTS)]
            table.writerow({"client": client, "text": " ".join(words), "label": f"class {label}"})
    content: dict[str, Any] = {
        "name": "tiny",
        "seed": seed,
        "threads": 1,
        "model": {"id": str(model)},
        "data": {
            "source": str(rows),
            "max_length": 16,
            "train_examples": 16,
            "clients": {"each": [{"cut": cut} for cut in CUTS]},
        },
        "train": {
            "rounds": rounds,
            "steps_per_round": steps_per_round,
            "batch_size": 4,
            "order": "random",
            "in_flight": in_flight,
        },
        "method": {"align": {"kind": "weights", "pull": 0.3, "every": 3, "teach": True}},
        "evaluation": {"measure_memory": False},
        "output": {"tensorboard": False, "html": False},
    }
    return validate(content, "tiny run")


def _set_dropout(model: Path, rate: float) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    set_dropout(config, rate)
    config.save_pretrained(model)


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*special, *WORDS])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
