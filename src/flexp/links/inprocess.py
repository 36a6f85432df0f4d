"""The link inside one process: every call runs at once, in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from flexp.links.base import Meter, Traffic
from flexp.links.coding import Coding
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PullReply,
    PullRequest,
    Welcome,
    size,
)
from flexp.links.translate import dtype_of, to_frame, to_message

Request = TypeVar("Request")
Reply = TypeVar("Reply")
Value = TypeVar("Value")
CPU = torch.device("cpu")


class Service(Protocol):
    """What a server offers to links. The client's name comes from the link, never from a message's content."""

    @property
    def aside_listeners(self) -> list[Callable[[str, str], None]]:
        """Told the name of each client that is put aside, and why; in the thread that computes."""
        ...

    def join(self, client: str, request: Join) -> Welcome: ...
    def forward(self, client: str, request: ForwardRequest) -> ForwardReply: ...
    def backward(self, client: str, request: BackwardRequest) -> BackwardReply: ...
    def pull(self, client: str, request: PullRequest) -> PullReply: ...
    def abort(self, client: str, request: Abort) -> None: ...
    def extend(self, client: str, request: ExtendRequest) -> ExtendReply: ...
    def end_generation(self, client: str, request: EndGeneration) -> None: ...
    def fetch(self, client: str, request: FetchRequest) -> FetchReply: ...
    def leave(self, client: str) -> None: ...

    def aside(self, client: str) -> str | None:
        """Why a client's requests are refused that was put aside; ``None``: it was not."""
        ...

    def readmit(self, client: str) -> bool:
        """Let a client in again that was put aside; gives whether it was."""
        ...

    def residuals(self, client: str) -> dict[str, Tensor]:
        """Where this side's error feedback for a client is kept (:class:`flexp.links.coding.Coding`)."""
        ...


class InProcessLink:
    """Calls a server in the same process; tensors pass by reference, detached by whoever makes the message.

    With a codec they become frames and messages again, as over a network, and only the bytes in between are left out.
    """

    def __init__(self, service: Service, client: str) -> None:
        self.meter = Meter()
        self.residuals: dict[str, Tensor] = {}
        self._service = service
        self._client = client
        self._ends: tuple[Coding, Coding] | None = None  # this one and the server's, if anything is coded

    @property
    def client(self) -> str:
        return self._client

    def join(self, request: Join) -> Welcome:
        welcome = self._service.join(self._client, request)
        kept = self.residuals, self._service.residuals(self._client)
        ours, theirs = (Coding(request.codec, dtype_of(request), welcome.hidden, where) for where in kept)
        self._ends = None if ours.exact else (ours, theirs)
        return welcome

    def forward(self, request: ForwardRequest) -> Future[ForwardReply]:
        return self._call(self._service.forward, request, self.meter.of(request.train))

    def backward(self, request: BackwardRequest) -> Future[BackwardReply]:
        return self._call(self._service.backward, request, self.meter.training)

    def pull(self, request: PullRequest) -> Future[PullReply]:
        return self._call(self._service.pull, request, self.meter.training)

    def abort(self, request: Abort) -> None:
        self._service.abort(self._client, request)

    def extend(self, request: ExtendRequest) -> Future[ExtendReply]:
        return self._call(self._service.extend, request, self.meter.evaluation)

    def end_generation(self, request: EndGeneration) -> None:
        self._service.end_generation(self._client, request)

    def fetch(self, request: FetchRequest) -> Future[FetchReply]:
        return self._call(self._service.fetch, request, self.meter.evaluation)

    def close(self) -> None:
        self._service.leave(self._client)

    def _call(self, handler: Callable[[str, Request], Reply], request: Request, traffic: Traffic) -> Future[Reply]:
        future: Future[Reply] = Future()
        began = time.perf_counter()
        try:
            sent, bytes_up = self._cross(request, up=True)
            traffic.bytes_up += bytes_up
            reply, bytes_down = self._cross(handler(self._client, sent), up=False)
        except Exception as error:
            future.set_exception(error)
            return future
        traffic.bytes_down += bytes_down
        traffic.exchanges += 1
        traffic.server_seconds += time.perf_counter() - began
        future.set_result(reply)
        return future

    def _cross(self, message: Value, *, up: bool) -> tuple[Value, int]:
        """What the other side makes of a message, and how many bytes of tensors carry it."""
        if self._ends is None:
            return message, size(message)
        sender, receiver = self._ends if up else self._ends[::-1]
        frame = to_frame(message, 0, coding=sender)
        device = frame.tensors[0].device if frame.tensors else CPU
        return to_message(frame, device, receiver), frame.head.payload
