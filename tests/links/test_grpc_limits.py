"""What a client may take of a server: memory, time, places in the queue."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from flexp.errors import LinkError
from flexp.links.coding import PLAIN
from flexp.links.frames import encode
from flexp.links.grpc import connect, serve
from flexp.links.grpc.stream import Memory
from flexp.links.messages import ForwardRequest
from flexp.links.rules import Limits
from tests.harness import world

from .grpc_tools import SOON, eventually, send_raw

FRAME = 4 * 8 * 100 * 32


def test_frames_wait_for_memory_and_all_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    reserve = Memory.reserve

    async def watched(self: Memory, client: str, size: int) -> None:
        await reserve(self, client, size)
        used.append(self.used)

    monkeypatch.setattr(Memory, "reserve", watched)
    here = world("llama")
    with serve(here.server, limits=Limits(memory_bytes=FRAME + 10, unanswered=2)) as serving:
        links = [connect(f"grpc://{serving.address}", name, codec="off") for name in "ab"]
        for link in links:
            here.client(link.client, (2, 4), link=link)
        answers: list[Future[Any]] = [
            link.call(ForwardRequest(number, torch.full((8, 100, 32), float(number))))
            for number in range(6)
            for link in links
        ]
        shapes = {tuple(answer.result(SOON).hidden_BTH.shape) for answer in answers}
        for link in links:
            link.close()
        assert serving._memory.used == 0
    assert shapes == {(8, 100, 32)}
    assert used.count(FRAME) == 12  # never two at a time
    assert max(used) == FRAME


def test_a_frame_beyond_all_memory_is_refused() -> None:
    here = world("llama")
    with serve(here.server, limits=Limits(memory_bytes=FRAME - 1)) as serving:
        link = connect(f"grpc://{serving.address}", "a", codec="off")
        here.client("a", (2, 4), link=link)
        with pytest.raises(LinkError, match="more than the server's memory in flight"):
            link.call(ForwardRequest(1, torch.zeros(8, 100, 32))).result(SOON)
        link.close()


def test_memory_of_a_frame_that_never_ends_is_given_back() -> None:
    here = world("llama")
    with serve(here.server, limits=Limits(frame_seconds=0.3)) as serving:
        link = connect(f"grpc://{serving.address}", "a", codec="off")
        here.client("a", (2, 4), link=link)
        frame = encode(PLAIN.frame(ForwardRequest(1, torch.zeros(60, 200, 32)), 9))
        lost = send_raw(link, lambda _: frame[:1])
        assert "the rest of a frame did not arrive within 0.3 s" in str(lost.exception(SOON))
        assert eventually(lambda: serving._memory.used == 0 and not serving.clients)
        link.close()


def test_who_connects_and_says_nothing_is_let_go() -> None:
    here = world("llama")
    with serve(here.server, limits=Limits(join_seconds=0.2)) as serving:
        link = connect(f"grpc://{serving.address}", "a", codec="off")
        assert eventually(lambda: not serving.clients)
        with pytest.raises(LinkError, match=r"client a connected, but did not join within 0\.2 s"):
            here.client("a", (2, 4), link=link)
        link.close()
