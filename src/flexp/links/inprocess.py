"""The link inside one process: every call runs at once, in the caller's thread."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexp.links.base import Meter, Service, Traffic
from flexp.links.coding import Coding
from flexp.links.declaring import Request
from flexp.links.messages import Join, Leave, Welcome, size
from flexp.links.rules import dtype_of

R = TypeVar("R")
CPU = torch.device("cpu")


class InProcessLink:
    """Calls a server in the same process; tensors pass by reference, detached by whoever makes the message.

    With a codec they become frames and messages again, as over a network, and only the bytes in between are left out.

    Attributes:
        service: the server.
    """

    def __init__(self, service: Service, client: str) -> None:
        self.meter = Meter()
        self.residuals: dict[str, Tensor] = {}
        self.service = service
        self._client = client
        self._ends: tuple[Coding, Coding] | None = None  # this one and the server's, if anything is coded

    @property
    def client(self) -> str:
        return self._client

    def call(self, request: Request[R]) -> Future[R]:
        future: Future[R] = Future()
        traffic, began = self.meter.counting(request), time.perf_counter()
        try:
            if traffic is None:
                answer: Any = self.service.answer(self._client, request)
                if isinstance(answer, Future):
                    return answer
                if isinstance(request, Join) and isinstance(answer, Welcome):
                    self._agree(request, answer)
                future.set_result(answer)
                return future
            sent, up = self._cross(request, up=True)
            traffic.bytes_up += up
            answer = self.service.answer(self._client, sent)
            if isinstance(answer, Future):
                answer.add_done_callback(lambda done: self._arrived(done, future, traffic))
                return future
            self._arrive(answer, future, traffic, began)
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        self.service.answer(self._client, Leave())

    def _arrive(self, answer: Any, future: Future[Any], traffic: Traffic, began: float) -> None:
        answer, down = self._cross(answer, up=False)
        traffic.bytes_down += down
        traffic.exchanges += 1
        traffic.server_seconds += time.perf_counter() - began
        future.set_result(answer)

    def _arrived(self, done: Future[Any], future: Future[Any], traffic: Traffic) -> None:
        """The same for an answer that came later, when others had come; what was waited for them was no computing."""
        try:
            self._arrive(done.result(), future, traffic, time.perf_counter())
        except Exception as error:
            future.set_exception(error)

    def _agree(self, join: Join, welcome: Welcome) -> None:
        kept = self.residuals, self.service.residuals(self._client)
        ours, theirs = (Coding(join.codec, dtype_of(join), welcome.hidden, where) for where in kept)
        self._ends = None if ours.exact else (ours, theirs)

    def _cross(self, message: R, *, up: bool) -> tuple[R, int]:
        """What the other side makes of a message, and how many bytes of tensors carry it."""
        if self._ends is None:
            return message, size(message)
        sender, receiver = self._ends if up else self._ends[::-1]
        frame = sender.frame(message, 0)
        device = frame.tensors[0].device if frame.tensors else CPU
        return receiver.message(frame, device), frame.head.payload
