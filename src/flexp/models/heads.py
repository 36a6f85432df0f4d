"""A classifier's head: the classes that a checkpoint's knows, and its rows under other names or in another order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from flexp.data.columns import rows_of
from flexp.kinds import KINDS


def trained_classes(config: Any, kind: str, pooling: str = "checkpoint") -> list[str]:
    """The names of the classes, row by row, of the head that a checkpoint brings; none where it brings no such head.

    Args:
        pooling: ``model.pooling``, which may put another head in its place.
    """
    told = KINDS[kind]
    wanted = told.auto.removeprefix("AutoModelFor")
    brought = any(name.endswith(wanted) for name in config.architectures or ())
    if not told.named or not brought or pooling not in ("checkpoint", getattr(config, "pooling", None)):
        return []
    return [str(config.id2label.get(row, f"LABEL_{row}")) for row in range(config.num_labels)]


def name_classes(config: Any, labels: Sequence[str]) -> None:
    """Let a model's configuration have these classes."""
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def fit_head(
    model: Any, head: Sequence[str], labels: Sequence[str], initialise: Callable[[nn.Module, Iterable[str]], None]
) -> set[str]:
    """Let a model whose classes are ``head`` have the classes ``labels``; each keeps the row of its name.

    Args:
        initialise: gives parameters, by their names, the values of new ones.

    Returns:
        The names of the parameters of the head, where none of its rows was kept.
    """
    rows = rows_of(head, labels)
    name_classes(model.config, labels)
    if rows == list(range(len(head))):
        return set()
    names = _by_class(model, len(head))
    before = {name: model.get_parameter(name) for name in names}
    for name, old in before.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module._parameters[leaf] = nn.Parameter(old.new_zeros(len(labels), *old.shape[1:]), requires_grad=False)
        if hasattr(module, "out_features"):
            module.out_features = len(labels)
    initialise(model, names)
    kept = [(new, old) for new, old in enumerate(rows) if old is not None]
    with torch.no_grad():
        for name, old in before.items():
            for target, row in kept:
                model.get_parameter(name)[target] = old[row]
    for module in model.modules():
        if getattr(module, "num_labels", None) == len(head):
            module.num_labels = len(labels)
    return set() if kept else names


def _by_class(model: Any, classes: int) -> set[str]:
    """The names of the parameters that have a row for each class: those that have one more with one class more."""
    config = copy.deepcopy(model.config)
    name_classes(config, [str(row) for row in range(classes + 1)])
    with torch.device("meta"):
        twin = type(model)._from_config(config, dtype=model.dtype)
    more = {name: list(value.shape) for name, value in twin.named_parameters()}
    # What is packed here has another shape than in the twin, but not by one row.
    return {
        name
        for name, value in model.named_parameters()
        if value.dim() and [value.shape[0] + 1, *value.shape[1:]] == more[name]
    }


AUTO: dict[str, Any] = {kind: getattr(transformers, told.auto) for kind, told in KINDS.items()}


def set_head(config: Any, kind: str) -> None:
    """Tell a model's configuration which loss it has and how many numbers it gives, as far as its kind says that."""
    told = KINDS[kind]
    if told.problem is not None:
        config.problem_type = told.problem
    if told.outputs is not None and config.num_labels != told.outputs:
        config.num_labels = told.outputs
