"""How an option of the command line is a key of the schema: ``--set KEY=VALUE``, and short names for some keys."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the configuration, e.g. train.rounds=3."),
]

Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")]

KEYS = {
    "model": "model.id",
    "kind": "data.task",
    "base_depth": "model.base_depth",
    "end": "deployment.end",
    "allow_export": "deployment.allow_export",
    "source": "data.source",
    "by": "data.clients.by",
    "count": "data.clients.count",
}
"""The key that an option stands for, by the option's name."""


def overrides(settings: list[str] | None, **options: Any) -> list[str]:
    """What ``--set`` and options say, as overrides; an option that is ``None`` or ``False`` says nothing."""
    said = {KEYS[name]: value for name, value in options.items() if value is not None and value is not False}
    return [*(f"{key}={json.dumps(value)}" for key, value in said.items()), *(settings or ())]
