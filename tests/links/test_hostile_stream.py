"""Clients that fill a server, and strangers that knock: others are served meanwhile."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import socket
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexp.config import GuardConfig, ServerConfig
from flexp.errors import LinkError
from flexp.links.coding import PLAIN
from flexp.links.frames import encode
from flexp.links.grpc import Tokens, connect, serve
from flexp.links.grpc.gate import Attempts, Seldom
from flexp.links.grpc.loop import Deadline, in_time
from flexp.links.grpc.status import ask_readmit, ask_status
from flexp.links.grpc.stream import Memory, Stream
from flexp.links.messages import ForwardRequest
from flexp.links.rules import Limits
from tests.harness import world

from .grpc_tools import SOON, send_raw

MIB = 1 << 20


def test_who_announces_large_frames_holds_up_nobody_who_sends_small_ones() -> None:
    async def play() -> None:
        memory = Memory(1024 * MIB)
        tasks = [asyncio.ensure_future(memory.reserve(f"greedy {number}", 256 * MIB)) for number in range(4)]
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [True, True, False, False]
        for number in range(40):
            await asyncio.wait_for(memory.reserve(f"small {number}", 12 * MIB // (1 + number // 30)), 1)
        assert memory.used <= memory.most
        assert memory.waiting == 2
        memory.release("greedy 0")
        await asyncio.wait_for(tasks[2], 1)  # first come
        memory.release("greedy 1")
        for number in range(40):
            memory.release(f"small {number}")
        await asyncio.wait_for(tasks[3], 1)
        memory.release("greedy 2")
        memory.release("greedy 3")
        assert (memory.used, memory.waiting, dict(memory.held)) == (0, 0, {})

    asyncio.run(play())


def test_a_stream_that_is_ended_leaves_nothing_unheard() -> None:
    """asyncio complains of exceptions that nobody looked at, on the terminal of whoever runs the server."""
    heard: list[Any] = []

    class Context:
        async def read(self) -> Any:
            await asyncio.Event().wait()

        async def abort(self, *_: Any) -> None:
            raise RuntimeError("aborted")  # as gRPC's does

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context["message"]))
        stream = Stream("a", Context(), Limits(), Memory(MIB), lambda *_: asyncio.get_running_loop().create_future())
        running = asyncio.ensure_future(stream.run())
        await asyncio.sleep(0)
        stream.end(LinkError("over"))
        with pytest.raises(RuntimeError, match="aborted"):
            await running
        await asyncio.sleep(0)

    asyncio.run(play())
    gc.collect()
    assert heard == []


@pytest.mark.parametrize("pause", [0.02, 10.0])
def test_a_whole_frame_has_a_deadline(pause: float) -> None:
    """One that comes a little at a time as much as one that does not come."""

    async def play() -> None:
        deadline, began = Deadline(0.2, lambda size: 0.3 + size / MIB), time.monotonic()
        for _ in range(1000):
            await in_time(asyncio.sleep(pause), deadline, MIB // 10, began, "the rest of a frame did not arrive")

    began = time.monotonic()
    with pytest.raises(LinkError, match=r"did not arrive within 0\."):
        asyncio.run(play())
    assert time.monotonic() - began < 5


def test_a_deadline_may_come_nearer_while_others_wait() -> None:
    async def play() -> None:
        seconds = [100.0]
        asyncio.get_running_loop().call_later(0.1, seconds.__setitem__, 0, 0.05)
        with pytest.raises(LinkError, match=r"within 0\.05 s"):
            await in_time(asyncio.sleep(50), Deadline(90.0, lambda _: seconds[0]), 1, time.monotonic(), "nothing")

    asyncio.run(play())


def test_a_frame_that_trickles_ends_its_stream() -> None:
    here = world("llama")
    with serve(here.server, limits=Limits(frame_seconds=0.2, slowest_bytes_per_second=100 * MIB)) as serving:
        link = connect(f"grpc://{serving.address}", "a", codec="off")
        here.client("a", (2, 4), link=link)
        frame = encode(PLAIN.frame(ForwardRequest(1, torch.zeros(60, 200, 32)), 9))
        lost = send_raw(link, lambda _: frame[:1])
        assert "the rest of a frame did not arrive" in str(lost.exception(SOON))
        link.close()


def known(*names: str) -> tuple[Tokens, dict[str, str]]:
    tokens = {name: " ".join([name] * 8) for name in names}
    return Tokens({name: hashlib.sha256(token.encode()).digest() for name, token in tokens.items()}), tokens


def test_guesses_lock_the_token_that_is_guessed_and_no_other_behind_the_address() -> None:
    here, heard = world("llama"), list[str]()
    tokens, right = known("a", "b", "c", "operator")
    with serve(here.server, tokens=tokens, say=heard.append, facts=lambda _: {"well": 1}) as serving:
        url = f"grpc://{serving.address}"
        connect(url, "c", token=right["c"]).close()
        for name in "abc":
            said = []
            for number in range(15 if name != "b" else 0):
                with pytest.raises(LinkError) as raised:
                    connect(url, name, token=f"guess {number}")
                said.append(str(raised.value))
            assert any("too many attempts" in line for line in said) is (name == "a")
        connect(url, "b", token=right["b"]).close()
        connect(url, "c", token=right["c"]).close()  # it was there before, and is not kept out by who guesses its token
        with pytest.raises(LinkError, match="too many attempts"):
            connect(url, "a", token=right["a"])
        assert any("a: refused, since its token is not the one on file (from 127.0.0.1)" in line for line in heard)


def test_the_operators_token_is_guessed_as_slowly_and_it_is_told() -> None:
    here, heard = world("llama"), list[str]()
    tokens, right = known("operator")
    with serve(here.server, tokens=tokens, say=heard.append, facts=lambda _: {"well": 1}) as serving:
        url = f"grpc://{serving.address}"
        said = []
        for number in range(14):
            with pytest.raises(LinkError) as raised:
                ask_status(url, token=f"guess {number}")
            said.append(str(raised.value))
        assert "needs the token of 'operator'" in said[0]
        assert "too many attempts" in said[-1]
        assert any("operator: asked in vain (from 127.0.0.1)" in line for line in heard)
        serving._gate._attempts._failures.clear()  # instead of waiting
        assert ask_status(url, token=right["operator"]) == {"well": 1}


def test_guesses_from_everywhere_lock_a_token_for_strangers() -> None:
    now = [0.0]
    attempts = Attempts(clock=lambda: now[0])
    for number in range(100):
        assert attempts.wait("a", "192.0.2.1") == 0
        attempts.failed("a", f"198.51.100.{number}")
    assert 0 < attempts.wait("a", "192.0.2.1") <= 60
    assert attempts.wait("b", "198.51.100.1") == 0


def test_what_is_told_again_and_again_is_told_seldom() -> None:
    now, heard = [0.0], list[str]()
    say = Seldom(heard.append, burst=3, seconds=10.0, most=2, clock=lambda: now[0])
    for _ in range(100):
        say("a", "again")
    assert heard == ["again"] * 3
    now[0] = 11.0
    say("a", "again")
    assert heard[3:] == ["again (97 more like this since)"]
    for number in range(50):
        say(str(number), "new")
    assert len(say._known) == 2


def test_where_there_are_no_tokens_nobody_readmits_itself() -> None:
    here = world("llama", config=ServerConfig(guard=GuardConfig(strikes=1)))
    with serve(here.server) as serving:
        url = f"grpc://{serving.address}"
        link = connect(url, "a", codec="off")
        here.client("a", (2, 4), link=link)
        link.call(ForwardRequest(1, torch.full((1, 2, 32), float("nan")), train=True)).exception(SOON)
        with pytest.raises(LinkError, match="cannot tell its operator from the client"):
            ask_readmit(url, "a", insecure=False)
        assert here.server.aside("a") is not None
        link.close()


def test_a_failure_that_a_client_can_repeat_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here, heard = world("llama"), list[str]()

    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    with serve(here.server, say=heard.append) as serving, caplog.at_level(logging.ERROR, "flexp.links"):
        link = connect(f"grpc://{serving.address}", "a", codec="off")
        here.client("a", (2, 4), link=link)
        monkeypatch.setattr(here.server.shared.stage, "run", fails)
        for number in range(30):
            error = link.call(ForwardRequest(number, torch.zeros(1, 2, 32))).exception(SOON)
            assert "the server failed (ZeroDivisionError" in str(error)
        link.close()
    assert len(caplog.records) == 1
    assert 1 <= len([line for line in heard if "failed: ZeroDivisionError" in line]) <= 11


def test_connections_that_say_nothing_are_let_go() -> None:
    """gRPC does it after ten seconds; here we see that it was told to, and that newcomers do not wait for it."""
    from flexp.links.grpc.loop import SERVER_OPTIONS

    assert dict(SERVER_OPTIONS)["grpc.server_handshake_timeout_ms"] <= 10_000
    here = world("llama")
    with serve(here.server) as serving:
        place = (serving.address.host, serving.address.port)
        silent = [socket.create_connection(place) for _ in range(250)]
        began = time.monotonic()
        connect(f"grpc://{serving.address}", "a").close()
        assert time.monotonic() - began < 5
        for one in silent:
            one.close()


def test_a_client_that_takes_no_answer_is_let_go() -> None:
    limits = replace(Limits(), frame_seconds=1.0)
    assert limits.seconds(0) == 1.0
    assert limits.seconds(64 * MIB) == pytest.approx(1 + 2048)
