"""What is tuned: for every method the same number of trials, over learning rates and its own key setting.

A method with a key setting of its own (:attr:`flexp.methods.base.Method.axis`) tries two values of it, with half as
many learning rates as a method without one. Learning rates are factors around the configuration's
``train.personal.lr`` (:data:`FACTORS`, the first ones), or taken from ``[compare] lrs``; ``train.shared.lr``, which
only split methods use, goes with them, unless :data:`RATIO` or the grid says otherwise. The values are those that the
methods' papers or their common implementations vary around.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexp.comparison.config import Comparison, Entry
from flexp.config import RunConfig
from flexp.config.loading import validate
from flexp.errors import ConfigError
from flexp.methods.base import RATIO, Method
from flexp.registry import METHODS

Settings = dict[str, Any]
"""Configuration key → value."""

PERSONAL, SHARED = "train.personal.lr", "train.shared.lr"

FACTORS = (1.0, 2.0, 0.5, 4.0, 8.0, 0.25)
"""Of the configuration's learning rate, in the order in which they are taken."""


def trials(comparison: Comparison, entry: Entry) -> list[Settings]:
    """The settings that are tried for ``entry``, fixed ones among them; empty if nothing is tuned.

    There are ``compare.trials`` of them, or fewer if the entry fixes its learning rate itself.

    Raises:
        ConfigError: a grid of the user's has more combinations than there are trials.
    """
    if not comparison.config.tune or not METHODS[entry.method].tuned:
        return []
    count, own = comparison.config.trials, _axes(comparison, entry)
    free = PERSONAL not in own and PERSONAL not in entry.fixed
    combinations = math.prod(len(values) for values in own.values())
    if entry.grid is not None and combinations > count:
        raise ConfigError(
            f"the grid of {entry.name} has {combinations} combinations, more than compare.trials = {count}; "
            "name fewer values, or allow more trials"
        )
    axes: dict[str, Sequence[Any]] = {}
    if free:
        axes[PERSONAL] = rates(comparison, math.ceil(count / combinations))
    elif combinations != count and PERSONAL in own:
        raise ConfigError(
            f"the grid of {entry.name} names its learning rates and has {combinations} combinations, not "
            f"compare.trials = {count}: every method has the same number"
        )
    axes |= own
    if not axes:
        return []
    made = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [_real(comparison, entry, settings) for settings in made[:count]]


def untried(comparison: Comparison, entry: Entry) -> Settings:
    """The settings of an entry that is not tuned, or all that it fixes."""
    return _real(comparison, entry, {})


def rates(comparison: Comparison, count: int) -> list[float]:
    """``count`` learning rates, ascending."""
    given = comparison.config.lrs
    if given is None:
        if count > len(FACTORS):
            raise ConfigError(
                f"compare.trials asks for {count} learning rates, and the default grid has {len(FACTORS)}: "
                "name them in compare.lrs"
            )
        return sorted(float(f"{comparison.base.train.personal.lr * factor:.6g}") for factor in FACTORS[:count])
    found = sorted(set(given))
    if len(found) >= count:  # as evenly among them as can be
        return (
            [found[len(found) // 2]]
            if count == 1
            else [found[i * (len(found) - 1) // (count - 1)] for i in range(count)]
        )
    low, high = found[0], found[-1]
    if low == high:
        raise ConfigError(f"compare.lrs has one learning rate, and {count} trials need another: name more")
    return [float(f"{low * (high / low) ** (index / (count - 1)):.6g}") for index in range(count)]


def apply(base: RunConfig, settings: Mapping[str, Any], where: str) -> RunConfig:
    """``base`` with other values of the keys of ``settings``.

    Raises:
        ConfigError: a key is unknown, or its value not allowed.
    """
    content = base.resolved()
    for key, value in settings.items():
        *tables, leaf = key.split(".")
        table = content
        for name in tables:
            table[name] = {} if table.get(name) is None else table[name]
            table = table[name]
            if not isinstance(table, dict):
                raise ConfigError(f"{where}: {key}: {name} is a value, not a table of keys")
        table[leaf] = value
    return validate(content, where)


def _axes(comparison: Comparison, entry: Entry) -> dict[str, Sequence[Any]]:
    """The entry's own axes without what it fixes, and without values named twice."""
    method: type[Method] = METHODS[entry.method]
    if entry.grid is not None:
        axes: dict[str, Sequence[Any]] = dict(entry.grid)
    elif method.axis is not None:
        key, values = method.axis
        own = {name: value for name, value in entry.fixed.items() if name != RATIO}
        base = apply(comparison.base, own, f"compare, {entry.name}")
        axes = {key: values(base) if callable(values) else values}
    else:
        axes = {}
    fixed = set(entry.fixed) | ({RATIO} if SHARED in entry.fixed else set())
    named = {key: _different(values) for key, values in axes.items() if key not in fixed}
    empty = next((key for key, values in named.items() if not values), None)
    if empty is not None:
        raise ConfigError(f"the grid of {entry.name} has no value for {empty}")
    return {key: values for key, values in named.items() if entry.grid is not None or len(values) > 1}


def _different(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _real(comparison: Comparison, entry: Entry, chosen: Settings) -> Settings:
    """All settings of a trial: fixed and chosen ones, :data:`RATIO` resolved, the shared rate beside the personal."""
    settings = {**entry.fixed, **chosen}
    ratio = settings.pop(RATIO, None)
    if SHARED not in settings and (PERSONAL in chosen or ratio is not None):
        personal = settings.get(PERSONAL, comparison.base.train.personal.lr)
        for key, value in ((PERSONAL, personal), (RATIO, ratio)):
            if not isinstance(value, int | float | None):
                raise ConfigError(f"compare, {entry.name}: {key} = {value!r} is no number")
        settings[SHARED] = float(f"{personal * (1.0 if ratio is None else ratio):.6g}")
    return settings
