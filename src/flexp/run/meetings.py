"""Whether clients meet (``method.meet``): what a configuration leaves open, settled from data and model."""

from __future__ import annotations

from typing import Any

from flexp.client.meeting import Meets, closed_form_of, has_linear_classifier
from flexp.config import RunConfig
from flexp.data.tasks import task_of
from flexp.data.types import Federation
from flexp.errors import ConfigError
from flexp.kinds import KINDS
from flexp.masking import cryptography
from flexp.methods.base import deployed, method_of


def meeting(config: RunConfig, on: bool) -> RunConfig:
    """The configuration with ``method.meet.on`` said."""
    meet = config.method.meet.model_copy(update={"on": on})
    return config.model_copy(update={"method": config.method.model_copy(update={"meet": meet})})


def check_masks(config: RunConfig) -> None:
    """See that sums of clients could be masked over a network.

    Raises:
        ConfigError: what masks their sums is not installed.
    """
    averages = deployed(config).averages
    if (Meets.of(config) or averages) and config.method.meet.masked:
        why = "clients' weights are averaged" if averages else "clients meet (unless method.meet.on = false)"
        cryptography("ciphers", f"{why}, and over a network the masks of their sums need")


def with_meetings(
    config: RunConfig, federation: Federation, model_config: Any, drawn: bool, alone: bool
) -> tuple[RunConfig, list[str]]:
    """Settle ``method.meet.on``, and say what comes of it.

    Args:
        drawn: whether no class of the classifier is in the checkpoint.
        alone: as :func:`flexp.run.settle.settle` has it.

    Raises:
        ConfigError: noise is asked for where numbers are learned.
    """
    method, meet, task = method_of(config), config.method.meet, task_of(config.data)
    kind, train = task.model_kind, config.train
    asked = config.model.head == "closed-form" or meet.on is True
    if asked and meet.noise and KINDS[kind].answers == "number":
        raise ConfigError("method.meet.noise is for classes: numbers that are learned have no bound; set it to 0")
    why = "" if method.meets else f"{method.name} knows no meeting"
    if asked and not closed_form_of(config):
        why = f"the task {task.name} has no closed form"
    if asked and why:
        return config, [f"clients do not meet: {why}, so model.head and method.meet are left out"]
    if meet.on != "auto":
        return config, []
    # With two classes a drawn classifier is as good, and a meeting is a pass over examples that a short run of many
    # has not even seen (docs/results/meeting.md).
    classes, off = len(federation.task.label_names or ()), meeting(config, on=False)
    worth = not asked and KINDS[kind].answers == "class" and classes > 2 and drawn
    seen = max(len(client.train) for client in federation.clients) <= train.total_steps * train.batch_size
    free = (alone or len(federation.clients) > 1) and train.early_stopping.patience is None
    free = free and not (config.privacy.on or config.server.noise)  # sums of classes tell clients of each other
    pooled = config.model.pooling != "checkpoint"
    if not (worth and seen and free and (pooled or has_linear_classifier(model_config, kind))):
        return off, []
    begins = f"the classifier of {classes} classes begins as drawn"
    if why:
        return off, [f"clients do not meet: {why}, so {begins}"]
    if alone:
        return off, [f"{begins}: method.meet.on = true on both sides lets clients meet, as a run on one machine does"]
    return meeting(config, on=True), [
        f"clients meet: the classifier of {classes} classes begins in closed form of class sums, not as drawn"
        + ("" if pooled else '; model.pooling = "mean" suits that best')
        + " (method.meet.on = false: they do not, and the run can be given more rounds later)"
    ]
