"""``flexp flower``: an app that ``flwr run`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Run a federation on Flower (docs/how-to/flower.md).")

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flexp-run"
version = "0.1.0"
description = "A FlexP run on Flower"
license = "Apache-2.0"
dependencies = ["flwr>=1.42.0,<2.0"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "flexp"
fab-format-version = 0

[tool.flwr.app.components]
serverapp = "flexp_app.apps:server"
clientapp = "flexp_app.apps:client"

[tool.flwr.app.config]
listen = "127.0.0.1:0" # where FlexP's own link listens: nodes must reach it
host = "" # by which nodes reach it, if not as in listen
state = "flexp-state" # the server's folder, to save in and to go on from
"""
APPS = """\
from pathlib import Path

from flexp.flower import client_app, server_app

server = server_app(Path(__file__).parent / "flexp.json")
client = client_app()
"""


@app.command("new")
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.")],
    config: Annotated[Path, typer.Option(help="The run's configuration; it names its clients: deployment.clients.")],
    settings: Settings = None,
) -> None:
    """Write an app: flwr run DIR starts the run of CONFIG.toml, and goes on where the last one was stopped."""
    from flexp.config.deployment import load
    from flexp.config.loading import overridden
    from flexp.errors import ConfigError
    from flexp.files import check_free, write_json

    if not load(config, settings or ()).clients:
        raise ConfigError(f"{config}: has no deployment.clients; name the run's clients there")
    check_free(folder, ("pyproject.toml", "flexp_app"), "a Flower app", "DIR")
    (folder / "flexp_app").mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    (folder / "flexp_app" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "flexp_app" / "apps.py").write_text(APPS, encoding="utf-8")
    write_json(folder / "flexp_app" / "flexp.json", overridden(config, settings or ()))  # with absolute paths
    typer.echo(f"{folder}: start it with flwr run {folder}")


COMMANDS = {"flower": app}
