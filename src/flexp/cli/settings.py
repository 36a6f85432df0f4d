"""How an option of the command line is a key of the schema: ``--set KEY=VALUE``, and short names for some keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the configuration, e.g. train.rounds=3."),
]

Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]

Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="auto, cpu, cuda:1, ..., of a server several, as in cuda:0,cuda:1; default: "
        "as the configuration says, or cpu.",
        show_default=False,
    ),
]  # fmt: skip

KEYS = {
    "device": "model.device",
    "server_device": "server.device",
    "model": "model.id",
    "kind": "data.task",
    "base_depth": "model.base_depth",
    "end": "deployment.end",
    "blocks": "deployment.blocks",
    "next_server": "deployment.next",
    "allow_export": "deployment.allow_export",
    "source": "data.source",
    "by": "data.clients.by",
    "count": "data.clients.count",
}
"""The key that an option stands for, by the option's name."""


def check_others(config: Path, settings: Sequence[str]) -> None:
    """See that what a configuration says in tables of other commands could be meant.

    A run leaves them alone, but a key that no command knows is a mistake that nobody else would tell.

    Raises:
        ConfigError: a key is unknown or impossible.
    """
    from flexp.config.loading import overridden

    content = overridden(config, settings)
    if "deployment" in content:
        from flexp.config import DeploymentConfig

        table = content["deployment"]
        if isinstance(table, dict) and table.get("clients") is None:  # whom a fleet knows from the data
            table = table | {"clients": ["whoever the data have"]}
        DeploymentConfig.checked(table, str(config), "deployment")
    if "compare" in content:
        from flexp.comparison.config import CompareConfig

        CompareConfig.checked(content["compare"], str(config), "compare")


def placed(device: str | None) -> dict[str, Any]:
    """What ``--device`` says of a run that has both sides, as options: of several names the server's blocks are spread
    over all, and all else is on the first."""
    if device is None or "," not in device:
        return {"device": device}
    names = device.split(",")
    return {"device": names[0], "server_device": names}


def overrides(settings: list[str] | None, **options: Any) -> list[str]:
    """What ``--set`` and options say, as overrides; an option that is ``None`` or ``False`` says nothing."""
    said = {KEYS[name]: value for name, value in options.items() if value is not None and value is not False}
    return [*(f"{key}={json.dumps(value)}" for key, value in said.items()), *(settings or ())]


def console(width: int = 120) -> Console:
    """Where tables go: a terminal, as wide as it is; a log or a pipe need not be narrow."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else width)
