"""The ``flexp`` command. Commands parse, call and print; the work is done in the rooms below."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flexp import __version__
from flexp.cli import (
    assets,
    client,
    compare,
    fleet,
    join,
    methods,
    plan,
    profile,
    readmit,
    run,
    server,
    state,
    status,
    token,
    use,
    verify,
    write,
)
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
app.command("demo")(run.demo)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("report")(run.report)
app.command("export")(use.export)
app.command("evaluate")(use.evaluate)
app.command("predict")(use.predict)
app.command("generate")(write.generate)
app.command("chat")(write.chat)
app.command("serve")(write.serve)
app.command("plan")(plan.plan)
app.command("verify")(verify.verify)
app.command("server")(server.server)
app.command("client")(client.client)
app.command("fleet")(fleet.fleet)
app.command("status")(status.status)
app.command("readmit")(readmit.readmit)
app.add_typer(token.app, name="token")
app.command("join")(join.join)
app.add_typer(state.app, name="state")
app.command("profile")(profile.profile)
app.command("methods")(methods.methods)
app.add_typer(assets.app, name="assets")


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


def main(command: typer.Typer = app, prog: str | None = None) -> None:
    """Entry point: one line and exit code 2 for a user's mistake, a traceback only for ours."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
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
