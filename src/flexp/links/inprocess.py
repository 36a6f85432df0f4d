"""The link inside one process: every call runs at once, in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from flexp.links.base import Meter, Traffic
from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PullReply,
    PullRequest,
    Welcome,
    size,
)

Request = TypeVar("Request")
Reply = TypeVar("Reply")


class Service(Protocol):
    """What a server offers to links. The client's name comes from the link, never from a message's content."""

    def join(self, client: str, request: Join) -> Welcome: ...
    def forward(self, client: str, request: ForwardRequest) -> ForwardReply: ...
    def backward(self, client: str, request: BackwardRequest) -> BackwardReply: ...
    def pull(self, client: str, request: PullRequest) -> PullReply: ...
    def abort(self, client: str, request: Abort) -> None: ...
    def extend(self, client: str, request: ExtendRequest) -> ExtendReply: ...
    def end_generation(self, client: str, request: EndGeneration) -> None: ...
    def leave(self, client: str) -> None: ...


class InProcessLink:
    """Calls a server in the same process; tensors pass by reference, detached by whoever makes the message."""

    def __init__(self, service: Service, client: str) -> None:
        self.meter = Meter()
        self._service = service
        self._client = client

    @property
    def client(self) -> str:
        return self._client

    def join(self, request: Join) -> Welcome:
        return self._service.join(self._client, request)

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

    def close(self) -> None:
        self._service.leave(self._client)

    def _call(self, handler: Callable[[str, Request], Reply], request: Request, traffic: Traffic) -> Future[Reply]:
        future: Future[Reply] = Future()
        began = time.perf_counter()
        traffic.bytes_up += size(request)
        try:
            reply: Any = handler(self._client, request)
        except Exception as error:
            future.set_exception(error)
            return future
        traffic.bytes_down += size(reply)
        traffic.exchanges += 1
        traffic.server_seconds += time.perf_counter() - began
        future.set_result(reply)
        return future
