"""What commands say to reach a server: options that several commands have, as one parameter each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from flexp.links.base import Link

Pem = Annotated[
    Path | None, typer.Option(envvar="FLEXP_CA", help="TLS: the certificate (PEM) that the server's is signed with.")
]
Cert = Annotated[Path | None, typer.Option(help="Mutual TLS: this client's certificate (PEM).")]
Key = Annotated[Path | None, typer.Option(help="Mutual TLS: the key of --cert (PEM).")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow plaintext beyond this machine.")]


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command with each of its parameters that is a dataclass replaced by the fields of that class, as options."""
    wanted = inspect.signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {name: each.annotation for name, each in wanted.items() if is_dataclass(each.annotation)}

    keyword = inspect.Parameter.KEYWORD_ONLY
    options: list[inspect.Parameter] = []
    for name, each in wanted.items():
        if name in groups:
            hints = get_type_hints(groups[name], include_extras=True)
            own = [inspect.Parameter(f.name, keyword, default=f.default) for f in fields(groups[name])]
            options += [option.replace(annotation=hints[option.name]) for option in own]
        else:
            options.append(each.replace(kind=keyword))

    def call(**said: Any) -> None:
        made = {name: of(**{each.name: said.pop(each.name) for each in fields(of)}) for name, of in groups.items()}
        command(**said, **made)

    call.__doc__, call.__name__ = command.__doc__, command.__name__
    call.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return call


@dataclass(frozen=True)
class Secured:
    """How a client and its server know each other."""

    token: Annotated[
        str | None,
        typer.Option("--token", envvar="FLEXP_TOKEN", help="The client's token, if the server asks for one."),
    ] = None
    ca: Pem = None
    cert: Cert = None
    key: Key = None
    insecure: Insecure = False
    verifier: Annotated[
        str | None, typer.Option(metavar="NAME", help="Send nothing to a server that does not attest, read by this.")
    ] = None
    measurement: Annotated[str | None, typer.Option(metavar="HEX", help="With --verifier: what must run there.")] = None

    def connect(self, server: str, name: str, **options: Any) -> Link:
        """A link of a client to the server at HOST:PORT, or at a URL."""
        from flexp.links.grpc import connect

        known: dict[str, Any] = {"token": self.token, "ca": self.ca, "certificate": self.cert, "key": self.key}
        known |= {"verifier": self.verifier, "measurement": self.measurement}
        return connect(url_of(server), name, **known, insecure=self.insecure, **options)


def url_of(server: str) -> str:
    """The URL of a server that a user has named: without a scheme it speaks plaintext."""
    return server if "://" in server else f"grpc://{server}"


@dataclass(frozen=True)
class Whose:
    """Which trained model is meant."""

    client: Annotated[
        str | None, typer.Option("--client", metavar="NAME", help="Whose model; of a run with one client, its own.")
    ] = None
    number: Annotated[
        str,
        typer.Option("--round", metavar="N|best|last", help="Of a run: after which round; of a client: a snapshot."),
    ] = "last"
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="grpc://HOST:PORT",
            help="Of what flexp client leaves (or a run): a running flexp server has the middle; grpcs:// means TLS. "
            "Several that are frozen, joined by commas: any of them.",
        ),
    ] = None


def reaching(whose: Whose, secured: Secured) -> Callable[[str], Link] | None:
    """What gives a link of the client that is named; ``None`` without a server."""
    server = whose.server
    return None if server is None else lambda name: secured.connect(server, name)


WHOSE, SECURED = Whose(), Secured()
