"""Stopping early (``train.early_stopping``): when scores on validation data get no better."""

from __future__ import annotations

from collections.abc import Mapping

from flexp.config import TrainConfig
from flexp.config.train import EarlyStopping
from flexp.errors import ConfigError


def ended(scores: Mapping[int, float | None], stopping: EarlyStopping, higher_is_better: bool) -> bool:
    """Whether the last ``patience`` scored rounds brought nothing better, by more than ``min_delta``, than one before.

    Args:
        scores: on validation data, by round; ``None``: not a number, which is no better.
    """
    if stopping.patience is None:
        return False
    best: float | None = None
    since, sign = 0, 1.0 if higher_is_better else -1.0
    for number in sorted(scores):
        value, since = scores[number], since + 1
        if value is not None and (best is None or sign * (value - best) > stopping.min_delta):
            best, since = value, 0
    return since >= stopping.patience


def may_be_last(number: int, train: TrainConfig) -> bool:
    """Whether a round's scores are kept with all tables: the one before training, the last, and any that may be it."""
    return number in (0, train.rounds) or train.early_stopping.patience is not None


def check_conducted(train: TrainConfig, schedule: str) -> None:
    """Refuse what a conductor cannot follow.

    Raises:
        ConfigError: a deterministic run would have to know everybody's scores before anybody goes on.
    """
    if train.early_stopping.patience is not None and schedule != "free":
        raise ConfigError(
            "train.early_stopping: in a deterministic run over a network nobody stops before the others; set "
            'deployment.schedule = "free", where every client stops for itself, or leave it out'
        )
