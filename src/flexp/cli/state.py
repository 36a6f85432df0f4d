"""``flexp state``: a client's personal parts as one file, and back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flexp.errors import ConfigError, plain

app = typer.Typer(
    name="state",
    help="A client's personal parts alone (weights, optimiser, counters): back up, show, restore.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="What flexp state backup wrote.")]
Variable = Annotated[
    str | None, typer.Option("--passphrase-env", metavar="VARIABLE", help="The passphrase is in this variable.")
]
Name = Annotated[str | None, typer.Option("--client", metavar="NAME", help="Whose; of a run with one client, its own.")]


@app.command()
def backup(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or what flexp client left.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The new file, a .safetensors.")],
    client: Name = None,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt it with a passphrase that is asked for.")] = False,
    variable: Variable = None,
    number: Annotated[
        str,
        typer.Option("--round", metavar="N|best|last", help="Of a run: after which round; of a client: a snapshot."),
    ] = "last",
) -> None:
    """Write the personal parts of a client to one file, encrypted if a passphrase is given."""
    from flexp.export.backup import back_up

    passphrase = _passphrase(variable, confirm=True) if encrypt or variable else None
    facts = back_up(run, client, out, passphrase, number)
    how = "encrypted" if passphrase else "not encrypted"
    typer.echo(f"{facts['client']!r} after round {facts['round']}: {_size(out)}, {how}, in {out}")


@app.command()
def restore(
    file: File,
    into: Annotated[Path, typer.Option("--into", metavar="RUN", help="The folder of the run, or of the client.")],
    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="Into whose place; default: the file's own client.")
    ] = None,
    variable: Variable = None,
) -> None:
    """Put a client's personal parts back into the last checkpoint of a run that is made alike."""
    from flexp.export.backup import restore as put
    from flexp.run.folder import is_client

    facts = put(file, into, client, _key(file, variable))
    if "snapshot" in facts and is_client(into):
        typer.echo(f"{facts['client']!r} is back in {into}, as snapshot {facts['into']} after {facts['steps']} steps")
        typer.echo("go on with the same flexp client command")
        return
    typer.echo(f"{facts['client']!r} is back in {into}, after round {facts['into']}")
    if facts["into"] != facts["round"]:
        typer.echo(f"note: the file is from after round {facts['round']}: this client goes on from its older state")
    typer.echo(f"go on with: flexp run --resume {into}")


@app.command()
def show(
    file: File,
    variable: Variable = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a file holds, after checking that it is whole."""
    from flexp.export.backup import read

    found = read(file, _key(file, variable))
    facts = found.facts | {
        "encrypted": found.encrypted,
        "weights_count": sum(value.numel() for value in found.weights.values()),
        "tensors": len(found.tensors),
        "bytes": file.stat().st_size,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for name, value in _lines(facts):
        typer.echo(f"{name:<13}{plain(value)}")


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lora = facts["lora"]
    tuning = "full" if lora is None else f"LoRA, rank {lora['rank']}, alpha {lora['alpha']:g}"
    return [
        ("client", f"{facts['client']}"),
        ("run", f"{facts['run']}, seed {facts['seed']}, after round {facts['round']} ({facts['steps']} steps)"),
        ("model", f"{facts['model']['name']} (configuration {facts['fingerprint']}, weights {facts['weights']})"),
        ("head", facts["model_kind"] + (f": {', '.join(facts['labels'])}" if facts["labels"] else "")),
        ("method", f"{facts['method']}, cut ({facts['cut'][0]}, {facts['cut'][1]}), {tuning}, {facts['dtype']}"),
        ("weights", f"{facts['weights_count']:,} trained, {facts['tensors']} tensors with optimiser and counters"),
        ("file", f"{facts['bytes']:,} bytes, {'encrypted' if facts['encrypted'] else 'not encrypted'}, whole"),
    ]


def _key(file: Path, variable: str | None) -> str | None:
    from flexp.export.sealed import is_sealed

    return _passphrase(variable) if is_sealed(file) else None


def _passphrase(variable: str | None, confirm: bool = False) -> str:
    """From a variable of the environment, else asked for on the terminal."""
    if variable is not None:
        if not os.environ.get(variable):
            raise ConfigError(
                f"--passphrase-env {variable}: there is no such variable, or it is empty; export it first"
            )
        return os.environ[variable]
    if not sys.stdin.isatty():
        raise ConfigError("a passphrase is needed, and there is no terminal to ask on; use --passphrase-env VARIABLE")
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm)
    return answer


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


COMMANDS = {"state": app}
