"""The ``[compare]`` table of a ``CONFIG.toml``: what is compared, over which seeds, and how it is tuned."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from flexp.config import ClientConfig, PositiveInt, Rate, RunConfig, Section, Seed
from flexp.config import loading as settings
from flexp.config.methods import DEFAULT, HEADLINE
from flexp.errors import ConfigError
from flexp.registry import METHODS

Grid = dict[str, list[Any]]
"""Configuration key → the values to try."""

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


class VariantConfig(Section):
    """A method with settings of its own, under a name of its own."""

    method: str | None = None  # None: the variant's name is the method's
    set: dict[str, Any] = Field(default_factory=dict)  # fixed: not tuned
    grid: Grid | None = None  # None: that of the method


class Needs(Section):
    """What a run needs where ``--engine`` places it; ``local`` gives each its share of the cores."""

    cpus: PositiveInt = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    memory_gb: Rate | None = None  # None: nothing is said
    minutes: PositiveInt = 240  # Slurm's limit of time


class CompareConfig(Section):
    """What ``flexp compare`` compares. Its options of the same names go before these keys."""

    methods: list[str] = Field(default_factory=lambda: list(HEADLINE), min_length=1)  # of METHODS or of variants
    seeds: PositiveInt | list[Seed] = 5  # so many from the run's seed on, or these
    trials: PositiveInt = 6  # of each method
    tune: bool = True  # False: every method with the configuration's own settings
    tune_seeds: PositiveInt = 1  # so many of the first seeds
    validation_fraction: float = Field(0.25, gt=0.0, lt=1.0)  # of private examples, in tuning, unless data has its own
    lrs: list[Rate] | None = None  # learning rates to try; None: factors around train.personal.lr
    reference: str | None = None  # None: the default method if it is compared, else the first
    variants: dict[str, VariantConfig] = Field(default_factory=dict)
    grids: dict[str, Grid] = Field(default_factory=dict)  # method → its grid, in place of the default one
    needs: Needs = Needs()

    @field_validator("seeds")
    @classmethod
    def _some(cls, seeds: int | list[int]) -> int | list[int]:
        if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds)):
            raise ValueError("seeds must be different, and one at least")
        return seeds


@dataclass(frozen=True)
class Entry:
    """One thing that is compared: ``name`` labels it, ``method`` is its key in METHODS."""

    name: str
    method: str
    fixed: dict[str, Any]
    grid: Grid | None


@dataclass(frozen=True)
class Comparison:
    """A comparison as it was asked for: everything that must be known before any model is loaded."""

    base: RunConfig
    config: CompareConfig
    entries: list[Entry]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the final runs."""
        wanted = self.config.seeds
        return wanted if isinstance(wanted, list) else [self.base.seed + index for index in range(wanted)]

    @property
    def tune_seeds(self) -> list[int]:
        """The seeds of the tuning runs."""
        return self.seeds[: self.config.tune_seeds]

    @property
    def reference(self) -> str:
        """Whose paired difference to every other is shown."""
        names = [entry.name for entry in self.entries]
        return self.config.reference or (DEFAULT if DEFAULT in names else names[0])


_SAME = frozenset(("data", "evaluation", "name", "output", "seed", "threads"))
_OF_CLIENTS = frozenset(ClientConfig.model_fields) - {"name"} | {"each", "plan"}
"""Of ``data.clients``: what clients hold and compute, not who they are."""


def load(path: Path, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None) -> Comparison:
    """Read a ``CONFIG.toml`` with its ``[compare]`` table, if it has one.

    Args:
        overrides: ``key=value``, of the run, or of the table as ``compare.key=value``.
        changes: keys of the table that go before it; a reference that is not among its methods is left out.

    Raises:
        ConfigError: what is unknown, of the wrong type or impossible.
    """
    overrides = list(overrides)
    own = [text for text in overrides if text.strip().startswith("compare.")]
    base = settings.load(path, [text for text in overrides if text not in own])
    content: dict[str, Any] = {"compare": settings.read(path).get("compare", {})}
    for text in own:
        settings.override(content, text)
    table = content["compare"]
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: compare = {table!r} is not allowed: expected a table [compare]")
    changes = changes or {}
    # The file's reference is for the file's methods; whoever names others need not know of it.
    if "methods" in changes and not any(text.strip().startswith("compare.reference") for text in own):
        table = {key: value for key, value in table.items() if key != "reference" or value in changes["methods"]}
    config = CompareConfig.checked({**table, **changes}, str(path), "compare")
    return make(base, config)


def make(base: RunConfig, config: CompareConfig) -> Comparison:
    """Find what the names of ``config.methods`` mean.

    Raises:
        ConfigError: a name is unknown or doubled, or the reference is not compared.
    """
    for name in config.variants:
        if not NAME.fullmatch(name):
            raise ConfigError(f"compare.variants.{name!r}: a variant's name is letters, digits and . _ + - only")
    if base.train.early_stopping.patience is not None:
        raise ConfigError("train.early_stopping: methods are compared after equally many steps; leave it out")
    names = config.methods
    if "methods" not in config.model_fields_set:
        names = [name for name in names if METHODS[name].suits(base)]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ConfigError(f"compare.methods names {doubled!r} twice")
    entries = [_entry(name, config) for name in names]
    if config.reference is not None and config.reference not in names:
        raise ConfigError(
            f"compare.reference = {config.reference!r} is not compared: expected one of {', '.join(names)}"
        )
    for method in config.grids:
        _known(method, METHODS, "compare.grids")
        _check_own(config.grids[method], f"compare.grids.{method}")
    return Comparison(base, config, entries)


def _entry(name: str, config: CompareConfig) -> Entry:
    variant = config.variants.get(name)
    if variant is None:
        _known(name, [*METHODS, *config.variants], "compare.methods")
        return Entry(name, name, {}, config.grids.get(name))
    method = variant.method or name
    _known(method, METHODS, f"compare.variants.{name}.method")
    _check_own([*variant.set, *(variant.grid or {})], f"compare.variants.{name}")
    return Entry(name, method, dict(variant.set), config.grids.get(method) if variant.grid is None else variant.grid)


def _check_own(keys: Iterable[str], where: str) -> None:
    """Refuse settings that are equal for all that is compared: other data, scores or seeds are another comparison.

    Raises:
        ConfigError: one of ``keys`` is such.
    """
    for key in keys:
        table, _, rest = key.partition(".")
        fixed = table in _SAME or key == "method.name"
        if fixed and not (table == "data" and rest.removeprefix("clients.") in _OF_CLIENTS):
            instead = f"{where}.method" if key == "method.name" else f"it for the whole comparison, --set {key}=…"
            raise ConfigError(f"{where}: {key} is the same for all that are compared; say {instead}")


def _known(name: str, known: Collection[str], where: str) -> None:
    if name not in known:
        raise ConfigError(f"{where}: there is no {name!r}; {METHODS.hint(name, known)}")
