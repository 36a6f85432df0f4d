"""The table ``[deployment]`` of a configuration: how a run on several machines is conducted, reached and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from flexp.config import loading as settings
from flexp.config.section import Rate, Section
from flexp.errors import ConfigError


class DeploymentConfig(Section):
    """What ``flexp server``, ``flexp client`` and ``flexp fleet`` do beside what a simulation does."""

    # free: nobody waits for anybody. deterministic: one client steps at a time, and the weights are a simulation's
    schedule: Literal["free", "deterministic"] = "free"
    clients: list[str] | None = None  # who takes part; None: whoever comes (schedule = "free")
    save_every: PositiveInt = 10  # steps of each client between two snapshots of all
    keep: PositiveInt = 3  # snapshots that every party keeps
    patience: Rate = 300.0  # seconds that a client tries to reach a server that has gone
    allow_export: bool = False  # the server gives clients the trained weights of the blocks that it runs for them
    answer_seconds: Rate = 120.0  # that a client waits for an answer before it connects anew and asks again


def load(path: Path) -> DeploymentConfig:
    """The table of a ``CONFIG.toml``; the defaults without one.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or impossible.
    """
    return validate(settings.read(path).get("deployment", {}), str(path))


def validate(content: Any, where: str) -> DeploymentConfig:
    """Check the table that came from ``where``.

    Raises:
        ConfigError: see :func:`load`.
    """
    made = DeploymentConfig.checked(content, where, "deployment")
    if made.schedule == "deterministic" and not made.clients:
        raise ConfigError(f'{where}: schedule = "deterministic" needs deployment.clients, the names of all clients')
    return made
