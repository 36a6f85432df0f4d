"""``flexp client``: one client as a process of its own, on the device that has the data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.reaching import SECURED, Secured, grouped, url_of
from flexp.cli.settings import Device, Settings, overrides
from flexp.errors import ConfigError


@grouped
def client(
    config: Annotated[Path, typer.Option(help="A run's configuration, as for flexp run; the server's must agree.")],
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Of flexp server; grpcs://HOST:PORT means TLS.")],
    name: Annotated[str | None, typer.Option(help="Which client of the data this is; with --data: its name.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="This client's own file: all of its rows are its data.", show_default=False)
    ] = None,
    cut: Annotated[str | None, typer.Option(metavar="S:E", help="Its cut; default: as the configuration says.")] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it saves, and goes on from; default: clients/NAME.")
    ] = None,
    left_code: Annotated[int, typer.Option(hidden=True)] = 0,  # of one that leaves before the end: a fleet asks
    secured: Secured = SECURED,
    settings: Settings = None,
    device: Device = None,
) -> None:
    """Take part in the run that a server conducts, with this device's private data; go on where it was stopped."""
    from flexp.cli.verify import parse_cut
    from flexp.config.deployment import load as load_deployment
    from flexp.config.loading import load, overridden

    said = overrides(settings, device=device)
    if data is not None:
        if name is None:
            raise ConfigError("--data needs --name, what the client is called")
        said += overrides(None, source=str(data.resolve()), by="iid", count=1)
    loaded, deployment = load(config, said), load_deployment(config, said)
    wanted = None if cut is None else parse_cut(cut)

    from flexp.files import folder_name
    from flexp.links.base import Link
    from flexp.links.grpc.diagnosis import proxy
    from flexp.links.grpc.security import Address
    from flexp.run.client import run_client
    from flexp.run.settle import settle_client

    setup = settle_client(loaded, name, wanted)
    for note in setup.run.federation.remarks:
        typer.echo(f"{setup.data.name}: {note}")
    url = url_of(server)

    between = proxy(Address.of_url(url))
    if between is not None:
        typer.echo(f"{setup.data.name}: by way of the proxy {between[1]} ({between[0]})")

    def reach() -> Link:
        return secured.connect(url, setup.data.name, timeout=deployment.answer_seconds)

    folder = state or Path("clients") / folder_name(setup.data.name)
    clients = setup.config.data.clients
    coded = "codec" in overridden(config, said).get("link", {}) or any(
        [clients.codec, *(one.codec for one in clients.each)]
    )
    codec = setup.config.link.codec if coded else None  # who says nothing gets the network's default
    if not run_client(setup, deployment, reach, folder, codec=codec):
        typer.echo("go on with the same command")
        raise typer.Exit(left_code)


COMMANDS = {"client": client}
