"""The ``flexp`` command. Commands parse, call and print; the work is done in the rooms below.

A module of this folder says in ``COMMANDS`` which commands it has, by name.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

import flexp.cli
from flexp import __version__
from flexp.errors import USER_ERROR, FlexpError
from flexp.limits import out_of_memory, reserve_less

app = typer.Typer(
    name="flexp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
    rich_markup_mode=None,  # plain help: rich would take longer to import than all else together
    help="Personalized split federated fine-tuning of transformers.",
)


def commands() -> dict[str, Any]:
    """Every command, or group of commands, by name: what the modules of this folder call ``COMMANDS``."""
    names = (found.name for found in iter_modules(flexp.cli.__path__) if found.name != "main")
    modules = [import_module(f"flexp.cli.{name}") for name in names]
    return dict(sorted(item for module in modules for item in getattr(module, "COMMANDS", {}).items()))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flexp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for _name, _command in commands().items():
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name)(_command)


def main(command: typer.Typer = app, prog: str | None = None) -> None:
    """Entry point: one line and exit code 2 for a user's mistake, a traceback only for ours."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("USE_HUB_KERNELS", "NO")  # transformers would fetch compiled code, with the package kernels
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    reserve_less()
    try:
        command(prog_name=prog)
    except FlexpError as error:
        typer.secho(f"flexp: {error}", fg="red", err=True)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        typer.secho("flexp: stopped; what was saved is safe", fg="red", err=True)
        sys.exit(130)
    except (MemoryError, RuntimeError, OSError) as error:
        line = out_of_memory(error)
        if line is None:
            raise
        typer.secho(f"flexp: {line}", fg="red", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
