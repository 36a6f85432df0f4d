"""One file per task; this one chooses among them."""

from __future__ import annotations

from typing import Any

from flexp.config import DataConfig
from flexp.data.tasks import instruction, multiple_choice
from flexp.data.tasks.base import template_columns
from flexp.data.tasks.causal_lm import CausalLM
from flexp.data.tasks.classification import Classification
from flexp.data.tasks.image_classification import ImageClassification
from flexp.data.tasks.instruction import Instruction
from flexp.data.tasks.multiple_choice import MultipleChoice
from flexp.data.tasks.text import Limit, pad_id
from flexp.data.types import Task
from flexp.errors import ConfigError

__all__ = ["LABELLED", "limit_of", "make_task", "needed_columns", "pad_id", "text_columns"]

LABELLED = ("classification", "image-classification", "multiple-choice")


def needed_columns(config: DataConfig) -> dict[str, str]:
    """The columns that the task reads, each with the configuration's key that names it.

    Raises:
        ConfigError: the template cannot be read.
    """
    needed: dict[str, str] = {}
    if config.task == "image-classification":
        needed[config.image] = "data.image"
    else:
        needed.update(dict.fromkeys(text_columns(config), "data.template"))
        for name, key in ((config.text, "text"), (config.prompt, "prompt")):
            if name in needed:
                needed[name] = f"data.{key}"
    if config.text_pair is not None and config.task == "classification":
        needed[config.text_pair] = "data.text_pair"
    if config.task == "instruction":
        needed[config.answer] = "data.answer"
    if config.task == "multiple-choice":
        names = [config.choices] if isinstance(config.choices, str) else config.choices
        needed.update(dict.fromkeys(names, "data.choices"))
    if config.task in LABELLED:
        needed[config.label] = "data.label"
    return needed


def text_columns(config: DataConfig) -> list[str]:
    """The columns whose text makes up an example's input; empty for images."""
    if config.task == "image-classification":
        return []
    if config.task == "instruction":
        return template_columns(config.template or instruction.TEMPLATE, config)
    if config.task == "multiple-choice":
        return template_columns(config.template or multiple_choice.TEMPLATE, config, own=("choices",))
    return template_columns(config.template or "{text}", config)


def limit_of(config: DataConfig, max_positions: int | None) -> Limit:
    """How many tokens an example may have: ``data.max_length``, or fewer where the model has fewer positions.

    Raises:
        ConfigError: blocks are longer than the model's positions.
    """
    if max_positions is None:
        return Limit(config.max_length, config.long_texts)
    if config.block_length is not None and config.block_length > max_positions:
        raise ConfigError(
            f"data.block_length = {config.block_length} is more than the model's {max_positions} positions; lower it"
        )
    return Limit(min(config.max_length, max_positions), config.long_texts, max_positions < config.max_length)


def make_task(config: DataConfig, processor: Any, limit: Limit, label_names: list[str]) -> Task:
    """The task that ``config`` names. ``label_names`` matters to classifiers only."""
    if config.task == "image-classification":
        return ImageClassification(config, processor, label_names)
    if config.task == "classification":
        return Classification(config, processor, limit, label_names)
    kinds: dict[str, type[CausalLM] | type[Instruction] | type[MultipleChoice]] = {
        "causal-lm": CausalLM,
        "instruction": Instruction,
        "multiple-choice": MultipleChoice,
    }
    return kinds[config.task](config, processor, limit)
