"""``flexp server``: the shared blocks as a process of its own, for clients on a network."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flexp.cli.reaching import Secured
from flexp.cli.settings import Device, Settings, overrides, placed
from flexp.cli.verify import parse_cut
from flexp.errors import ConfigError, plain
from flexp.kinds import ModelKind


def server(
    model: Annotated[
        str | None, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME (model.id).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Conduct the run of this configuration; a table `data` is not needed.")
    ] = None,
    kind: Annotated[
        ModelKind | None, typer.Option(help="What the model is for. Default: as --config says, or causal-lm.")
    ] = None,
    base_depth: Annotated[
        int | None, typer.Option(min=0, help="First block that the server holds (model.base_depth). Default: 1.")
    ] = None,
    end: Annotated[
        int | None, typer.Option(min=1, help="Behind its last block (deployment.end). Default: all.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(metavar="S:E", help="Of them those that this server holds, one of several (deployment.blocks)."),
    ] = None,
    next_server: Annotated[
        str | None,
        typer.Option("--next", metavar="URL", help="The server with the blocks behind them (deployment.next)."),
    ] = None,
    next_ca: Annotated[
        Path | None, typer.Option(help="TLS: the certificate (PEM) that the next server's is signed with.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="FLEXP_TOKEN", help="Of the name 'chain', if the next server asks for one.")
    ] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Port 0: any that is free.")] = "127.0.0.1:7070",
    cert: Annotated[Path | None, typer.Option(help="TLS: the server's certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="TLS: the key of --cert (PEM).")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Mutual TLS: clients need certificates that this one signed (PEM).")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="What flexp token keeps: a hash and a name for each client.")
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Again for each client that may come. Default: all.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plaintext beyond this machine.")] = False,
    verifier: Annotated[
        str | None, typer.Option(metavar="NAME", help="Give clients evidence of what runs here, made by this.")
    ] = None,
    allow_export: Annotated[
        bool,
        typer.Option(
            "--allow-export",
            help="Clients may fetch the trained shared blocks of their models, also after the run "
            "(deployment.allow_export).",
        ),
    ] = False,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Nobody trains the blocks: they are for generation and prediction alone.")
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(help="The folder to save in, and to go on from if something is there."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to answer /metrics, /healthz and /readyz over HTTP.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two lines of progress.")] = 30.0,
    settings: Settings = None,
    device: Device = None,
) -> None:
    """Serve the shared blocks to clients until Ctrl-C or SIGTERM, or conduct a run to its end; then save and stop.

    How the model is tuned and computed, and who takes part, are keys of the configuration: --set model.tuning=lora.
    """
    if model is None and config is None:
        raise ConfigError("say what to serve: --model MODEL, or --config CONFIG.toml to conduct a run")
    if (cert is None) != (key is None) or (client_ca is not None and cert is None):
        raise ConfigError("TLS needs both --cert and --key; --client-ca comes on top of them")
    import torch

    from flexp.data.tasks import task_for, task_of
    from flexp.links.grpc import ServerTls, Tokens
    from flexp.links.rules import Limits
    from flexp.registry import VERIFIERS
    from flexp.run.chaining import PATIENCE, follows, take_place
    from flexp.run.conduct import Conductor
    from flexp.run.folder import check_state
    from flexp.run.server import make_conductor, make_server, read_config, rise
    from flexp.server import Server
    from flexp.server.chain import PREVIOUS

    if state is not None:
        check_state(state, server=True)

    def say(line: str) -> None:
        typer.echo(f"flexp server: {plain(line)}")

    if config is None:
        kind = kind or "causal-lm"
    task = None if kind is None else task_for(kind)
    own = None if blocks is None else parse_cut(blocks, "--blocks")
    given = {"model": model, "kind": task, "base_depth": base_depth, "end": end}
    where = placed(device)  # a server has one side alone
    given["server_device"] = where.get("server_device", device)
    said = overrides(settings, allow_export=allow_export, blocks=own, next_server=next_server, **given)
    loaded, deployment = read_config(config, said)
    if loaded.threads is not None:
        torch.set_num_threads(loaded.threads)
    depth = 1 if loaded.model.base_depth is None else loaded.model.base_depth
    model_kind, conducts = task_of(loaded.data).model_kind, config is not None
    if deployment.blocks is not None and not conducts:
        raise ConfigError("several servers share the blocks of a run: give each the same --config")
    if frozen and conducts:
        raise ConfigError("--config conducts a run, whose blocks are frozen when it is over: leave out --frozen")
    led = follows(deployment, depth)
    url, ours = deployment.next, Secured(token, next_ca, cert, key, insecure)

    def begin() -> tuple[Server, Conductor | None]:
        made = make_server(
            loaded,
            depth,
            deployment.end,
            model_kind,
            deployment.clients,
            deployment=deployment,
            remembers=conducts and not led,
        )
        patience = max(deployment.answer_seconds, PATIENCE)
        reach = None if url is None else partial(ours.connect, url, codec="off", timeout=patience)
        take_place(made, loaded, deployment, state, reach, say)
        return made, make_conductor(made, loaded, deployment, state, say) if conducts and not led else None

    known = None if tokens is None else Tokens.read(tokens)
    missing = None if known is None else known.missing([PREVIOUS] if led else deployment.clients)
    if missing is not None:
        say(missing)
    rate = deployment.bytes_per_second
    rise(
        begin,
        listen,
        state=None if conducts else state,
        keep=deployment.keep,
        allow_export=deployment.allow_export,
        frozen=frozen,
        dismiss=deployment.on_stop == "leave",
        say=say,
        every=every,
        metrics=metrics,
        limits=Limits(
            max_tokens=deployment.max_tokens,
            requests_per_second=deployment.requests_per_second,
            bytes_per_second=math.inf if rate is None else rate,
        ),
        tls=None if cert is None or key is None else ServerTls(cert, key, client_ca),
        tokens=known,
        allow=allow,
        insecure=insecure,
        verifier=None if verifier is None else VERIFIERS[verifier](),
    )


COMMANDS = {"server": server}
