"""The client's side of a link over gRPC."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
import torch
from torch import Tensor

from flexp.config import CodecConfig
from flexp.errors import LinkError, LinkLostError, plain
from flexp.links.base import Meter, Traffic
from flexp.links.coding import PLAIN, Coding
from flexp.links.declaring import Request
from flexp.links.frames import Frame, Head, Outgoing
from flexp.links.grpc.loop import background, read_frame, wait_for
from flexp.links.grpc.security import Address
from flexp.links.messages import Join, Leave, Refusal, Welcome
from flexp.links.rules import Agreement, bounded, check_reply, check_request
from flexp.rng import current_turn, resting

R = TypeVar("R")
CPU = torch.device("cpu")
GOODBYE_SECONDS = 5.0


@dataclass
class _Call:
    """A request that waits for its answer."""

    request: Request[Any]
    head: Head
    future: Future[Any]
    traffic: Traffic | None
    device: torch.device
    reads: int | None  # rows that the answer has, where the request says which
    leaves: Outgoing | None = None  # where it may have to leave again
    again: bool = False  # whether it was asked again, so that its future is another call's as well
    timer: asyncio.TimerHandle | None = None
    began: float = field(default_factory=time.monotonic)


class GrpcLink:
    """One stream to a server; see :func:`flexp.connect`. One that broke stays broken: connect anew, and rejoin.

    Attributes:
        header_bytes: what crossed besides tensors, (up, down); the meter counts tensors.
        codec: what whoever joins without a codec gets.
        residuals: of error feedback (:class:`flexp.links.coding.Coding`), to be saved and given back.
        one_of: servers that were named, so many; of several none may be trained.
    """

    one_of = 1

    def __init__(self, channel: Any, stream: Any, address: Address, client: str, timeout: float) -> None:
        self.meter = Meter()
        self.header_bytes = [0, 0]
        self.codec = CodecConfig.all("bf16")
        self.residuals: dict[str, Tensor] = {}
        self._coding = PLAIN
        self._channel, self._stream = channel, stream
        self._address, self._client, self._timeout = address, client, timeout
        self._agreement: Agreement | None = None
        self._places, self._numbers = itertools.count(1), itertools.count(1)  # as they come, and as they leave
        self._calls: dict[int, _Call] = {}
        self._broken: LinkError | None = None
        self._outgoing: asyncio.PriorityQueue[tuple[bool, int, _Call, Outgoing]] = asyncio.PriorityQueue()
        self._tasks = [asyncio.ensure_future(self._send_all()), asyncio.ensure_future(self._receive_all())]

    @property
    def client(self) -> str:
        return self._client

    @property
    def address(self) -> tuple[str, int]:
        """The server's host and port."""
        return self._address.host, self._address.port

    @property
    def broken(self) -> LinkError | None:
        """Why it broke, if it did."""
        return self._broken

    def call(self, request: Request[R]) -> Future[R]:
        """As :meth:`flexp.links.base.Link.call`.

        An answer that takes longer than the link's timeout gives the link up, as it may have been lost. One that waits
        for other clients is asked for again, which tells whether the server is there.
        """
        sent: Request[Any] = request
        if isinstance(request, Join) and request.codec is None:
            sent = replace(request, codec=self.codec)
        try:
            frame = self._coding.frame(sent, next(self._places))
            check_request(frame.head, self._agreement, self._client)
            leaves = Outgoing(frame)  # in the caller's thread, which may change its tensors afterwards
        except LinkError as error:
            return _failed(error)
        traffic = self.meter.counting(request)
        if traffic is not None:
            traffic.bytes_up += frame.head.payload
        device = frame.tensors[0].device if frame.tensors else CPU
        rows_BT = getattr(request, "rows_BT", None)
        reads = None if rows_BT is None else int(rows_BT.sum())
        call = _Call(sent, frame.head, Future(), traffic, device, reads, leaves if sent.waits else None)
        background().call_soon_threadsafe(self._enqueue, call, leaves)
        return call.future

    def close(self) -> None:
        left = False
        if self._broken is None:
            with suppress(LinkError, TimeoutError), resting(current_turn()):
                self.call(Leave()).result(GOODBYE_SECONDS)
                left = True
        wait_for(self._shut(LinkError(f"client {self._client}: the link is closed"), left))

    # What follows runs on the loop.

    def _enqueue(self, call: _Call, leaves: Outgoing) -> None:
        if self._broken is not None:
            call.future.set_exception(self._broken)
            return
        call.timer = background().call_later(self._timeout, self._late, call)
        self._outgoing.put_nowait((not call.request.urgent, call.head.call, call, leaves))

    def _late(self, call: _Call) -> None:
        if call.leaves is not None and not call.again:
            # The server answers the earlier call at once, if it is there, so that one has the time of any other.
            call.again, head = True, replace(call.head, call=next(self._places))
            if call.traffic is not None:
                call.traffic.bytes_up += head.payload
            call.timer = background().call_later(self._timeout, self._late, call)
            self._enqueue(replace(call, head=head, again=False, timer=None, began=time.monotonic()), call.leaves)
            return
        self._fail(f"no answer to {call.head.message} within {self._timeout:g} s; the link is given up")

    async def _send_all(self) -> None:
        try:
            while True:
                _, _, call, leaves = await self._outgoing.get()
                number = next(self._numbers)
                self._calls[number] = call
                for message in leaves.messages(number):
                    self.header_bytes[0] += len(message)
                    await self._stream.write(message)
                self.header_bytes[0] -= call.head.payload
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the receiving side learns why

    async def _receive_all(self) -> None:
        try:
            while True:
                frame = await read_frame(self._stream.read, grpc.aio.EOF, self._check)
                if frame is None:
                    status = await self._stream.code()
                    raise LinkLostError(await self._stream.details() or f"the server ended the stream ({status.name})")
                self._answer(frame)
        except grpc.aio.AioRpcError as error:
            refused = error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            self._fail(reason(error, self._address), LinkError if refused else LinkLostError)
        except LinkError as error:
            self._fail(str(error), type(error))
        except asyncio.CancelledError:
            self._fail("the link is closed")
            raise
        except Exception as error:
            self._fail(f"the link failed ({type(error).__name__}: {error})")
            raise

    def _check(self, head: Head) -> None:
        if head.message == Refusal.__name__ and not head.call and not head.fields:
            return
        call = self._calls.get(head.call)
        if call is not None:
            check_reply(head, call.head, self._agreement, call.reads)
        elif head.payload > (0 if self._agreement is None else self._agreement.frame_bytes):
            raise LinkError(f"the server sends {head.payload} bytes that nobody asked for")

    def _answer(self, frame: Frame) -> None:
        head = frame.head
        self.header_bytes[1] += head.size
        call = self._calls.pop(head.call, None)
        if call is None and head.call:
            return  # an answer that came twice
        answer = self._coding.message(frame, CPU if call is None else call.device)
        if call is None:
            raise answer.as_error()
        if call.timer is not None:
            call.timer.cancel()
        if call.future.done() or (call.again and isinstance(answer, Refusal)):
            return  # the other call of the same request has the answer, or will have it
        if isinstance(answer, Refusal):
            call.future.set_exception(answer.as_error())
            return
        if call.traffic is not None:
            call.traffic.bytes_down += head.payload
            call.traffic.exchanges += 1
            passed = time.monotonic() - call.began  # whatever the server says that it computed
            call.traffic.server_seconds += min(max(head.seconds, 0.0), passed)
        if isinstance(call.request, Join) and isinstance(answer, Welcome):
            if self.one_of > 1 and not answer.trained:
                call.future.set_exception(LinkError(
                    f"{self.one_of} servers are named, and that at {self._address} may still be trained, or is one of "
                    "a chain, so what they have may differ: name one, or start each with --frozen"
                ))  # fmt: skip
                return
            self._agreement = Agreement.of(call.request, bounded(answer))
            self._coding = Coding(call.request.codec, self._agreement.dtype, answer.hidden, self.residuals)
        call.future.set_result(answer)

    def _fail(self, text: str, kind: type[LinkError] = LinkLostError) -> None:
        if self._broken is None:
            self._broken = kind(text)
        calls, self._calls = list(self._calls.values()), {}
        while not self._outgoing.empty():
            calls.append(self._outgoing.get_nowait()[2])
        for call in calls:
            if call.timer is not None:
                call.timer.cancel()
            if not call.future.done():
                call.future.set_exception(self._broken)
        self._stream.cancel()
        self._tasks[0].cancel()  # nothing is sent any more

    async def _shut(self, why: LinkError, left: bool) -> None:
        self._broken = self._broken or why
        if left:  # the server ends the stream when the client's name is free for its next one
            await asyncio.wait(self._tasks[1:], timeout=GOODBYE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()


def _failed(error: LinkError) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def last_part(details: str | None) -> str:
    """Of what gRPC says about a failed connection, the part that a reader can use, with addresses as users write them
    (``[::1]:7070``, not ``ipv6:%5B::1%5D:7070``)."""
    said = re.sub(r"^.*last error: (UNKNOWN|UNAVAILABLE): ", "", plain(details or "no reason given"))
    return re.sub(r"\bipv[46]:(?=\d|\[|%5B)(\S+)", lambda found: plain(unquote(found[1])), said)


def reason(error: grpc.aio.AioRpcError, address: Address) -> str:
    details = plain(error.details() or "no reason given")
    if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.ABORTED):
        return details
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return f"the server at {address} cannot be reached, or has gone ({last_part(details)})"
    return f"the link to {address} failed ({error.code().name}: {details})"
