"""``flexp generate``, ``flexp chat`` and ``flexp serve``: personal language models at work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexp.cli.reaching import Ca, Cert, Insecure, Key, Server, Token, reaching
from flexp.cli.use import Client, Round
from flexp.errors import FlexpError
from flexp.texts import plain

if TYPE_CHECKING:
    from flexp.serving.writer import GenerationConfig, Writer, Written

Model = Annotated[Path, typer.Argument(help="The folder of a run, an exported one, or what flexp client left.")]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0: always the likeliest token. Default: as the model's own settings say.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Choose among the likeliest tokens with this share.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Choose among so many tokens.")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1: less repetition.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End before this text.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling; default: another each time.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Torch's threads.", show_default=False)]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="What to go on from; - reads it from the standard input.")],
    client: Client = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    seed: Seed = None,
    number: Round = "last",
    server: Server = None,
    token: Token = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    threads: Threads = None,
) -> None:
    """Let a personal language model go on from a prompt, token by token."""
    generation = _generation(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    generation.options()  # a mistake is told before a model is loaded
    text = sys.stdin.read() if prompt == "-" else prompt
    writer = _open(model, client, number, reaching(server, token, ca, cert, key, insecure), threads)
    try:
        found = writer.write(writer.ids_of(text), generation, _show)
        typer.echo()
        typer.echo(_facts(writer, found), err=True)
    finally:
        writer.close()


def chat(
    model: Model,
    client: Client = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    max_new_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    seed: Seed = None,
    number: Round = "last",
    server: Server = None,
    token: Token = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    threads: Threads = None,
) -> None:
    """Talk with a personal language model; /reset forgets what was said, /quit (or Ctrl-D) ends."""
    generation = _generation(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    generation.options()
    writer = _open(model, client, number, reaching(server, token, ca, cert, key, insecure), threads)
    begin: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
    said = list(begin)
    try:
        writer.ids_of_chat([*begin, {"role": "user", "content": "hello"}])  # whether it can chat at all
        typer.echo(f"{writer.client!r}, {writer.about}. /reset forgets what was said, /quit ends.", err=True)
        while (line := _ask()) is not None:
            if line == "/reset":
                said = list(begin)
                typer.echo("forgotten", err=True)
            elif line:
                question = {"role": "user", "content": line}
                try:
                    found = writer.write(writer.ids_of_chat([*said, question]), generation, _show)
                except FlexpError as error:  # what was said before is still there
                    typer.secho(f"flexp: {error}", fg="red", err=True)
                    continue
                typer.echo()
                said += [question, {"role": "assistant", "content": found.text}]
    finally:
        writer.close()


def serve(
    model: Model,
    client: Client = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; beyond this machine (0.0.0.0, say) it needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="FLEXP_API_KEY", help="What applications must say.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of a chat's answer, where the application sets no limit.")
    ] = 512,
    number: Round = "last",
    server: Server = None,
    token: Token = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    insecure: Insecure = False,
    threads: Threads = None,
) -> None:
    """Offer a personal language model to applications, as the OpenAI API does (needs the extra `serve`)."""
    from flexp.serving.listening import check_listening, run

    check_listening(host, api_key)
    writer = _open(model, client, number, reaching(server, token, ca, cert, key, insecure), threads)
    try:
        run(writer, host, port, api_key, max_new_tokens, lambda line: typer.echo(f"flexp serve: {line}"))
    finally:
        writer.close()


def _open(
    model: Path, client: str | None, number: str, connect: Callable[[str], Any] | None, threads: int | None
) -> Writer:
    import torch

    from flexp.serving.writer import open_writer

    if threads is not None:
        torch.set_num_threads(threads)
    return open_writer(model, client, number, connect)


def _generation(
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    seed: int | None,
) -> GenerationConfig:
    from flexp.serving.writer import GenerationConfig

    return GenerationConfig(max_new_tokens, temperature, top_p, top_k, repetition_penalty, tuple(stop or ()), seed)


def _ask() -> str | None:
    """The next line of the person at the keyboard, or of a pipe; ``None`` when that is all."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if line.strip() == "/quit" else line.strip()


def _show(text: str) -> None:
    sys.stdout.write(plain(text, len(text), keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _facts(writer: Writer, found: Written) -> str:
    rate = found.tokens / found.seconds if found.seconds else 0.0
    end = "" if found.reason == "stop" else ", and would go on (--max-new-tokens)"
    return f"[{writer.client!r}, {writer.about}: {found.tokens} tokens, {rate:.1f} a second{end}]"


COMMANDS = {"generate": generate, "chat": chat, "serve": serve}
