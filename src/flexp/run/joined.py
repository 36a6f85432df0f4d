"""The folder of a client that joined a run later: a run of one client, whose labels are the earlier run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flexp.config import DataConfig, RunConfig
from flexp.data import load_federation
from flexp.data.types import Federation
from flexp.errors import StorageError
from flexp.files import read_json
from flexp.methods.base import World
from flexp.run.setup import build_world

FILE = "join.json"
SCHEMA = 1


def is_joined(folder: Path) -> bool:
    """Whether ``folder`` is that of such a client."""
    return (folder / FILE).is_file()


def world_of(folder: Path, config: RunConfig) -> World:
    """What the run in ``folder`` started from, be it a federation or one client that joined it.

    Raises:
        FlexpError: model or data are not what they were.
    """
    if not is_joined(folder):
        return build_world(config)
    return joined_world(config, read_json(folder / FILE))


def joined_world(config: RunConfig, facts: Mapping[str, Any]) -> World:
    """The world of one client that joined, as ``join.json`` names it and its labels.

    Raises:
        StorageError: the facts are not those of such a client.
        FlexpError: model or data are not what they were.
    """
    try:
        if facts["schema"] != SCHEMA:
            raise StorageError(f"{FILE} is of another version of FlexP; run flexp join again")
        name, labels = str(facts["client"]), facts["labels"]
    except (KeyError, TypeError) as error:
        raise StorageError(f"{FILE} is not what flexp join wrote ({error}); run flexp join again") from error
    return build_world(config, partial(_alone, name=name, labels=labels or []))


def _alone(
    data: DataConfig, processor: Any, seed: int, max_positions: int | None, *, name: str, labels: list[str]
) -> Federation:
    found = load_federation(data, processor, seed, max_positions, labels)
    (client,) = found.clients
    return replace(found, clients=[replace(client, name=name)])
