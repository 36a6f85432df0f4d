"""The endpoint as a program: it says where it is, answers, and stops when it is told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time

import httpx
import pytest

from flexp.errors import ConfigError
from flexp.serving.listening import run

from .tools import Scripted, writer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_until_it_is_told_to_stop(number: signal.Signals) -> None:
    lines: list[str] = []
    texts: list[str] = []
    before = signal.getsignal(number)

    def use() -> None:
        try:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                found = re.search(r"(http://127\.0\.0\.1:\d+/v1)", "\n".join(lines))
                try:
                    if found:
                        body = {"model": "north", "prompt": "the", "max_tokens": 2}
                        answer = httpx.post(f"{found[1]}/completions", json=body, timeout=20)
                        texts.append(answer.json()["choices"][0]["text"])
                        return
                except httpx.ConnectError:
                    pass
                time.sleep(0.05)
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=use)
    thread.start()
    run(writer(Scripted()), "127.0.0.1", 0, None, 16, lines.append)
    thread.join(20)
    assert texts == [" the red"]
    assert lines[-1] == "stopped"
    assert signal.getsignal(number) is before


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"):
            run(writer(Scripted()), "127.0.0.1", port, None, 16, lambda line: pytest.fail(line))
