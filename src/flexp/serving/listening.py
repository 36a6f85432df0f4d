"""Where the endpoint listens, and who may reach it there."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from flexp.errors import ConfigError
from flexp.serving.writer import Writer
from flexp.signals import on_signal

SHORTEST_KEY = 16


def check_listening(host: str, api_key: str | None) -> None:
    """Refuse to be reached from other machines without a key, and keys that can be guessed.

    Raises:
        ConfigError: see above, or the extra ``serve`` is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("flexp serve needs two more packages: pip install 'flexp[serve]'") from error
    if api_key is not None and (len(api_key) < SHORTEST_KEY or not api_key.isascii() or not api_key.isprintable()):
        raise ConfigError(f"the API key is too short or odd: expected at least {SHORTEST_KEY} plain characters")
    if not is_loopback(host) and api_key is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines: set an API key (FLEXP_API_KEY, or --api-key), or leave "
            "--host out"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(
    writer: Writer, host: str, port: int, api_key: str | None, chat_tokens: int, say: Callable[[str], None]
) -> None:
    """Answer applications until Ctrl-C or SIGTERM.

    Raises:
        ConfigError: it cannot listen there.
    """
    import uvicorn

    from flexp.serving.app import make_app

    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(kind, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror or error}); choose another --port"
        ) from error
    with listening:
        port = listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        say(f"{writer.client!r} ({writer.about}) at http://{shown}:{port}/v1, model name {writer.client!r}")
        if not is_loopback(host):
            say("this is plain HTTP: what is asked and answered can be read on the way, unless a proxy adds TLS")
        app = make_app(writer, api_key, chat_tokens, loopback=is_loopback(host))
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        # uvicorn stops on a signal and then raises it once more: that one must not end us before our time
        with on_signal(lambda: None):
            uvicorn.Server(config).run(sockets=[listening])
    say("stopped")
