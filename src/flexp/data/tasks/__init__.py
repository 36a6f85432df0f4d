"""The tasks: one class each, found by name (:mod:`flexp.registry`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexp.config import DataConfig
from flexp.data.tasks.base import BaseTask, Limit
from flexp.data.tasks.text import pad_id
from flexp.errors import ConfigError
from flexp.kinds import KINDS
from flexp.registry import TASKS

__all__ = ["limit_of", "make_task", "pad_id", "task_for", "task_of"]


def task_of(config: DataConfig) -> type[BaseTask]:
    """The class of the task that ``config`` names.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    task: type[BaseTask] = TASKS[config.task]
    return task


def task_for(kind: str) -> str:
    """The name of a task whose models are of that kind, for a server, to which its other sides do not matter.

    Raises:
        ConfigError: there is none.
    """
    for name, task in TASKS.items():
        if task.model_kind == kind:
            return name
    raise ConfigError(f"no task has a model for {kind}; expected one of {', '.join(KINDS)}")


def make_task(config: DataConfig, processor: Any, limit: Limit, label_names: Sequence[str]) -> BaseTask:
    """The task that ``config`` names. ``label_names`` matters to classifiers only."""
    return task_of(config)(config, processor, limit, label_names)


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
