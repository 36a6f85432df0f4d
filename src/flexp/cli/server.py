"""``flexp server``: the shared blocks as a process of its own, for clients on a network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from flexp.cli.verify import Dtype, Memory, Task
from flexp.errors import ConfigError


def server(
    model: Annotated[str | None, typer.Option(help="Folder, Hugging Face id, asset:NAME or arch:NAME.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Conduct a run: its configuration (a table `data` is not needed), which says what options on models "
            "say; only --model and --base-depth stand above it."
        ),
    ] = None,
    clients: Annotated[
        str | None, typer.Option(metavar="A,B", help="Who takes part in the run; default: deployment.clients.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="free or deterministic; default: deployment.schedule.")] = None,
    kind: Annotated[Task, typer.Option(help="What the model is for.")] = Task.causal_lm,
    base_depth: Annotated[
        int | None,
        typer.Option(min=0, help="First block that the server holds, s_min. Default: as --config says, or 1."),
    ] = None,
    end: Annotated[int | None, typer.Option(min=1, help="Behind its last block. Default: all.")] = None,
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
    max_requests: Annotated[
        float, typer.Option(min=0.1, help="Of a client in a second; who sends faster is read more slowly.")
    ] = 1000.0,
    max_rate: Annotated[
        float | None, typer.Option(min=0.001, help="MB of tensors that a client may send in a second.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow plaintext beyond this machine.")] = False,
    allow_export: Annotated[
        bool,
        typer.Option(
            "--allow-export", help="Clients may fetch the trained shared blocks of their models; also after the run."
        ),
    ] = False,
    state: Annotated[
        Path | None,
        typer.Option(help="The folder to save in, and to go on from if something is there."),
    ] = None,
    tuning: Annotated[str, typer.Option(help="full, lora or frozen.")] = "full",
    rank: Annotated[int, typer.Option(min=1, help="LoRA: rank of the adapters.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA: scale of the adapters.")] = 16.0,
    lr: Annotated[float, typer.Option(min=1e-12, help="Learning rate of the shared blocks.")] = 1e-4,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = Dtype.float32,
    memory: Annotated[Memory, typer.Option(help="Keep activations, or compute them again.")] = Memory.keep,
    max_tokens: Annotated[int, typer.Option(min=1, help="Batch × length of an exchange, at most.")] = 32_768,
    seed: Annotated[int, typer.Option(help="Of the clients' dropout on this side.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Torch's threads.", show_default=False)] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to answer /metrics, /healthz and /readyz over HTTP.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two lines of progress.")] = 30.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --config: override a key.")
    ] = None,
) -> None:
    """Serve the shared blocks to clients until Ctrl-C or SIGTERM, or conduct a run to its end; then save and stop."""
    if model is None and config is None:
        raise ConfigError("say what to serve: --model MODEL, or --config CONFIG.toml to conduct a run")
    if (cert is None) != (key is None) or (client_ca is not None and cert is None):
        raise ConfigError("TLS needs both --cert and --key; --client-ca comes on top of them")
    if tuning not in ("full", "lora", "frozen"):
        raise ConfigError(f"--tuning {tuning}: expected full, lora or frozen")
    import torch

    from flexp.links.grpc import ServerTls, Tokens
    from flexp.links.rules import Limits
    from flexp.run.server import run_server

    def say(line: str) -> None:
        typer.echo(f"flexp server: {line}")

    options: dict[str, Any] = {
        "say": say,
        "every": every,
        "metrics": metrics,
        "limits": Limits(
            max_tokens=max_tokens,
            requests_per_second=max_requests,
            bytes_per_second=math.inf if max_rate is None else 1e6 * max_rate,
        ),
        "tls": None if cert is None or key is None else ServerTls(cert, key, client_ca),
        "tokens": None if tokens is None else Tokens.read(tokens),
        "allow": allow,
        "insecure": insecure,
    }
    if config is not None:
        from flexp.data.tasks import task_of
        from flexp.run.server import make_conductor, make_server, read_config

        overrides = [*(settings or ()), *([] if model is None else [f"model.id={json.dumps(model)}"])]
        loaded, deployment = read_config(config, overrides, clients, schedule)
        torch.set_num_threads(threads or loaded.threads or torch.get_num_threads())
        depth = base_depth if base_depth is not None else loaded.model.base_depth
        model_kind = task_of(loaded.data).model_kind
        made = make_server(loaded, 1 if depth is None else depth, end, model_kind, deployment.clients)
        conductor = make_conductor(made, loaded, deployment, state, say)
        run_server(made, listen, conductor=conductor, allow_export=allow_export or deployment.allow_export, **options)
        return

    from flexp.config import LoraConfig, OptimizerConfig, ServerConfig
    from flexp.server import Server

    assert model is not None
    if threads is not None:
        torch.set_num_threads(threads)
    made = Server.from_pretrained(
        model,
        kind.value,
        base_depth=1 if base_depth is None else base_depth,
        end=end,
        lora=LoraConfig(rank=rank, alpha=alpha),
        dtype=dtype.value,
        seed=seed,
        config=ServerConfig.model_validate({"memory": memory.value, "tuning": tuning}),
        optimizer=OptimizerConfig(lr=lr),
    )
    run_server(made, listen, state=state, allow_export=allow_export, **options)
