"""Cuts that are planned instead of written down: ``data.clients.cuts = "auto"`` and ``data.clients.plan``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flexp.experiments.settings import override, read
from flexp.planner.fleet import Fleet, parse_fleet


def load_fleet(path: Path, overrides: Iterable[str] = ()) -> Fleet:
    """Read a ``fleet.toml`` and apply ``key=value`` overrides; profiles that it names are found beside it.

    Raises:
        ConfigError: it cannot be read, or see :func:`flexp.planner.fleet.parse_fleet`.
    """
    content = read(path)
    for text in overrides:
        override(content, text)
    return parse_fleet(content, str(path), path.parent)
