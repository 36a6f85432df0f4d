"""``flexp generate``, ``flexp chat`` and ``flexp serve``: personal language models at work."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexp.cli.reaching import SECURED, WHOSE, Secured, Whose, grouped, reaching
from flexp.cli.settings import Device
from flexp.errors import FlexpError, plain

if TYPE_CHECKING:
    from flexp.serving.writer import GenerationConfig, Writer, Written

Model = Annotated[Path, typer.Argument(help="The folder of a run, an exported one, or what flexp client left.")]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of an answer.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Torch's threads.", show_default=False)]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0: always the likeliest token. Default: as the model's own settings say."),
    ] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Choose among the likeliest tokens with this share.")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Choose among so many tokens.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: less repetition.")
    ] = None
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text.")] = None
    seed: Annotated[int | None, typer.Option(help="Of sampling; default: another each time.")] = None

    def generation(self, max_new_tokens: int) -> GenerationConfig:
        """Settings for the writer; a mistake is told before a model is loaded."""
        from flexp.serving.writer import GenerationConfig

        made = GenerationConfig(max_new_tokens, **{**vars(self), "stop": tuple(self.stop or ())})
        made.options()
        return made


SAMPLING = Sampling()


@grouped
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="What to go on from; - reads it from the standard input.")],
    whose: Whose = WHOSE,
    max_new_tokens: MaxTokens = 256,
    sampling: Sampling = SAMPLING,
    secured: Secured = SECURED,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Let a personal language model go on from a prompt, token by token."""
    generation = sampling.generation(max_new_tokens)
    text = sys.stdin.read() if prompt == "-" else prompt
    writer = _open(model, whose, secured, threads, device)
    try:
        found = writer.write(writer.ids_of(text), generation, _show)
        typer.echo()
        typer.echo(_facts(writer, found), err=True)
    finally:
        writer.close()


@grouped
def chat(
    model: Model,
    whose: Whose = WHOSE,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    max_new_tokens: MaxTokens = 512,
    sampling: Sampling = SAMPLING,
    secured: Secured = SECURED,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Talk with a personal language model; /reset forgets what was said, /quit (or Ctrl-D) ends."""
    generation = sampling.generation(max_new_tokens)
    writer = _open(model, whose, secured, threads, device)
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
                    found = writer.write(writer.ids_of_chat([*said, question]), generation, _show, chat=True)
                except FlexpError as error:  # what was said before is still there
                    typer.secho(f"flexp: {error}", fg="red", err=True)
                    continue
                typer.echo()
                said += [question, {"role": "assistant", "content": found.text}]
    finally:
        writer.close()


@grouped
def serve(
    model: Model,
    whose: Whose = WHOSE,
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
    secured: Secured = SECURED,
    threads: Threads = None,
    device: Device = None,
) -> None:
    """Offer a personal language model to applications, as the OpenAI API does (needs the extra `serve`)."""
    from flexp.serving.listening import check_listening, run

    check_listening(host, api_key)
    writer = _open(model, whose, secured, threads, device)
    try:
        run(writer, host, port, api_key, max_new_tokens, lambda line: typer.echo(f"flexp serve: {line}"))
    finally:
        writer.close()


def _open(model: Path, whose: Whose, secured: Secured, threads: int | None, device: str | None) -> Writer:
    import torch

    from flexp.serving.writer import open_writer

    if threads is not None:
        torch.set_num_threads(threads)
    return open_writer(model, whose.client, whose.number, reaching(whose, secured), device)


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
