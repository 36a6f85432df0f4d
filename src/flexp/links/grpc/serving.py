"""The server's side of links over gRPC: one stream a client, and one thread that computes."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from flexp.errors import ConfigError, FlexpError, FullError, LinkError, LinkLostError
from flexp.limits import out_of_memory
from flexp.links.base import Later, Service, never_wait
from flexp.links.coding import PLAIN, Coding
from flexp.links.frames import VERSION, Frame, Head, encode
from flexp.links.grpc.attesting import EVIDENCE, Attesting, Verifier
from flexp.links.grpc.gate import Gate, Seldom
from flexp.links.grpc.loop import METHOD, SERVER_OPTIONS, SERVICE, wait_for
from flexp.links.grpc.security import PROTOCOL_KEY, Address, ServerTls, check_listening
from flexp.links.grpc.status import operator_handlers
from flexp.links.grpc.stream import Answer, Memory, Rates, Stream, refused
from flexp.links.grpc.tokens import Tokens
from flexp.links.messages import BackwardReply, ForwardReply, Join, Leave, Refusal, Welcome
from flexp.links.rules import Limits, dtype_of

CPU = torch.device("cpu")
Value = TypeVar("Value")
log = logging.getLogger("flexp.links")


LARGE = 64 << 10
"""Bytes from which on an answer is worth another thread's attention."""
Made = tuple[Welcome | Refusal | None, list[bytes] | Frame]
"""What was computed: an answer, perhaps to be encoded yet."""
STOPPING = "the server is stopping; connect again when it is back"


def _see_free(asked: Address) -> None:
    """Bind there and let go again: gRPC itself says why it cannot listen only in a log of its own.

    Raises:
        ConfigError: the port is taken, or none of the host's addresses is here.
    """
    bound, failure = 0, OSError("no such host")
    try:
        places = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen at {asked} ({error}); give another HOST:PORT") from error
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(place)
            bound += 1
        except OSError as error:
            failure = error
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                bound = 0
                break
    if not bound:  # gRPC is content with one of them
        why = failure.strerror or failure
        raise ConfigError(f"cannot listen at {asked} ({why}); give another HOST:PORT") from failure


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    never_wait()


def _quiet(_: str) -> None:
    pass


class Serving:
    """Lets clients on a network use a service; see :func:`serve`.

    Attributes:
        address: where it listens.
    """

    def __init__(
        self,
        service: Service,
        listen: str = "127.0.0.1:0",
        *,
        limits: Limits | None = None,
        tls: ServerTls | None = None,
        tokens: Tokens | None = None,
        allow: Collection[str] | None = None,
        insecure: bool = False,
        device: torch.device = CPU,
        say: Callable[[str], None] = _quiet,
        facts: Callable[[Serving], dict[str, Any]] | None = None,
        verifier: Verifier | None = None,
        bearer: str | None = None,
    ) -> None:
        asked = Address.of_text(listen)
        check_listening(asked, tls, tokens, insecure=insecure)
        self.limits = limits or Limits()
        self.say = say
        self._service, self._device, self._tokens = service, device, tokens
        self._facts = facts
        if verifier is not None and tls is None:
            raise ConfigError("evidence is bound to the key of TLS: give a certificate and its key")
        self._attests = None if verifier is None or tls is None else Attesting(verifier, tls.certificate_der)
        self._gate = Gate(tokens, allow, service.aside, say, bearer=bearer)
        self._rates = Rates(self.limits)
        self._codings: dict[str, Coding] = {}  # of clients that joined; used in the thread that computes
        self._stopping = self._working = False
        self._timer: asyncio.TimerHandle | None = None
        self._seldom, self._failed = Seldom(say), set[str]()
        self._worker = ThreadPoolExecutor(1, "flexp-server", _begin, (torch.get_num_threads(),))
        self._encoder = ThreadPoolExecutor(1, "flexp-encoder")
        self._memory = Memory(self.limits.memory_bytes)
        credentials = None if tls is None else tls.credentials()
        if tls is not None and tls.outdated is not None:
            say(tls.outdated)
        self.address = wait_for(self._start(asked, credentials))

    @property
    def clients(self) -> list[str]:
        """Who is connected."""
        return sorted(self._gate.inside)

    def at_rest(self, action: Callable[[], Value]) -> Value:
        """Run ``action`` between two requests, in the thread that computes."""
        return self._worker.submit(action).result()

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work`` after what waits already, in the thread that computes; never, if it has stopped."""
        with suppress(RuntimeError):
            self._worker.submit(work)

    def refuse_more(self) -> None:
        """Answer every further request with a refusal, and say so to who asks for the server's health."""
        self._stopping = True
        asyncio.run_coroutine_threadsafe(self._health.enter_graceful_shutdown(), self._loop)

    def stop(self, grace: float = 1.0) -> None:
        """Stop listening, give streams ``grace`` seconds to end, and drop what is in flight."""
        wait_for(self._end(grace))
        self._worker.shutdown()
        self._encoder.shutdown()

    async def _end(self, grace: float) -> None:
        self._watching.cancel()
        self._service.aside_listeners.remove(self._quarantine)
        await self._server.stop(grace)
        while self._gate.inside:  # each hands its leaving to the worker
            await asyncio.sleep(0.005)

    async def _start(self, asked: Address, credentials: grpc.ServerCredentials | None) -> Address:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        method = grpc.stream_stream_rpc_method_handler(self._stream)
        methods = {METHOD: method}
        facts = None if self._facts is None else lambda told=self._facts: told(self)
        methods |= operator_handlers(
            facts, None if self._tokens is None else self._service.readmit, self._gate.admit_operator
        )
        if self._attests is not None:
            methods[EVIDENCE] = grpc.unary_unary_rpc_method_handler(self._attests.answer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        _see_free(asked)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(str(asked))
            else:
                port = self._server.add_secure_port(str(asked), credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen at {asked}: is the certificate wrong, or its key another's?") from error
        await self._server.start()
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.ensure_future(self._gate.watch())
        self._service.aside_listeners.append(self._quarantine)
        return Address(asked.host, port)

    async def _stream(self, _: Any, context: Any) -> None:
        client = await self._gate.admit(context)
        stream = Stream(client, context, self.limits, self._memory, self._compute, self._rates)
        self._gate.enter(client, stream)
        try:
            await context.send_initial_metadata(((PROTOCOL_KEY, str(VERSION)),))
            await stream.run()
        finally:
            self._gate.leave(client)
            self.say(f"{client}: gone")
            self._worker.submit(self._leave, client)  # after all that it still has waiting there

    def _quarantine(self, client: str, why: str) -> None:
        self._loop.call_soon_threadsafe(self._gate.quarantine, client, why)

    def _compute(self, client: str, frame: Frame, lines: Callable[[], None]) -> asyncio.Future[Answer]:
        """The answer to a request, computed in the one thread that does."""
        loop = asyncio.get_running_loop()
        computed = loop.run_in_executor(self._worker, self._work, client, frame)
        return asyncio.ensure_future(self._known(client, frame.head, computed, lines))

    async def _known(
        self, client: str, head: Head, computed: asyncio.Future[Made | Future[Made]], lines: Callable[[], None]
    ) -> Answer:
        """The answer, once it is known; meanwhile nothing is computed for the client."""
        answer = await computed
        if isinstance(answer, Later):
            lines()
        said, made = await asyncio.wrap_future(answer) if isinstance(answer, Future) else answer
        if not isinstance(made, Frame):
            return said, made
        whole: Callable[[], Answer] = lambda: (said, encode(made))  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(self._encoder, self._or_refusal, client, head, whole)

    def _work(self, client: str, frame: Frame) -> Made | Future[Made]:
        try:
            return self._or_refusal(client, frame.head, lambda: self._answer(client, frame))
        finally:
            self._go_on()

    def _go_on(self) -> None:
        """Let the service answer who waits, after what has come meanwhile; one such job is in the queue at a time."""
        if self._service.busy and not self._working:
            self._working = True
            with suppress(RuntimeError):  # it has ended
                self._worker.submit(self._work_on)

    def _work_on(self) -> None:
        self._working = False
        again = self._service.work()
        if again:
            self._loop.call_soon_threadsafe(self._go_on_after, again)
        elif again is not None:
            self._go_on()

    def _go_on_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._go_on)

    def _or_refusal(self, client: str, head: Head, make: Callable[[], Value]) -> Value | Answer:
        try:
            return make()
        except FlexpError as error:
            return refused(error, head.call)
        except Exception as error:  # one client's request must not end the others' server
            if out_of_memory(error) is not None:
                return refused(
                    FullError(f"client {client}: the server's memory ran out at a {head.message}"), head.call
                )
            kind = f"{head.message} {type(error).__name__}"
            new = kind not in self._failed  # what a client can repeat would fill the log
            self._failed.add(kind)
            self._seldom(client, f"{client}: {head.message} failed: {type(error).__name__}: {error}")
            if new:
                log.exception("the request %s of client %s failed", head.message, client)
            return refused(f"the server failed ({type(error).__name__}: {error})", head.call)

    def _answer(self, client: str, frame: Frame) -> Made | Future[Made]:
        head, began = frame.head, time.perf_counter()
        coding = self._codings.get(client, PLAIN)
        request = coding.message(frame, self._device)
        if isinstance(request, Leave):
            self._codings.pop(client, None)
        elif self._stopping:
            raise LinkLostError(STOPPING)
        reply: Any = self._service.answer(client, request)
        if isinstance(reply, Future):
            return self._later(client, head, reply, coding)
        if isinstance(request, Join):
            reply = self.limits.told(reply)
            kept = self._service.residuals(client)
            self._codings[client] = Coding(request.codec, dtype_of(request), reply.hidden, kept)
            self.say(f"{client}: joined with cut {request.cut}")
        messages = self._encoded(coding, head, reply, time.perf_counter() - began)
        return reply if isinstance(request, Join) else None, messages

    def _later(self, client: str, head: Head, reply: Future[Any], coding: Coding) -> Future[Made]:
        """The answer to be; it is coded where the reply is made."""
        answer: Future[Made] = Later() if isinstance(reply, Later) else Future()

        def known(done: Future[Any]) -> None:
            if answer.set_running_or_notify_cancel():
                seconds = getattr(done, "seconds", 0.0)
                make = lambda: (None, self._encoded(coding, head, done.result(), seconds))  # noqa: E731
                answer.set_result(self._or_refusal(client, head, make))

        answer.add_done_callback(lambda gone: gone.cancelled() and reply.cancel())  # nobody takes it any more
        reply.add_done_callback(known)
        return answer

    def _encoded(self, coding: Coding, head: Head, reply: Any, seconds: float) -> list[bytes] | Frame:
        """The answer coded, which error feedback has in the order of what is computed, and copied from the device. Of a
        large one that nobody changes, check sums and bytes are left to the thread that encodes."""
        answer = coding.frame(reply, head.call, seconds)
        if answer.head.payload > self.limits.frame_bytes:  # the client would have to refuse it, and end the stream
            raise LinkError(
                f"the answer to {head.message} has {answer.head.payload} bytes, and a frame holds at most "
                f"{self.limits.frame_bytes}"
            )
        if answer.head.payload >= LARGE and isinstance(reply, ForwardReply | BackwardReply):
            return replace(answer, tensors=tuple(value.detach().cpu() for value in answer.tensors))
        return encode(answer)

    def _leave(self, client: str) -> None:
        self._codings.pop(client, None)
        self._service.answer(client, Leave())
        self._go_on()


@contextmanager
def serve(service: Service, listen: str = "127.0.0.1:0", **options: Any) -> Iterator[Serving]:
    """Let clients on a network use ``service`` inside the ``with`` block.

    Args:
        listen: HOST:PORT. Beyond this machine it needs ``tls`` and ``tokens``; port 0 is any that is free.
        options: of :class:`Serving`: ``limits``, ``tls``, ``tokens``, ``allow`` (the names that may come),
            ``insecure``, ``device`` (where the service computes), ``say`` (told who comes and goes), ``facts`` (what it
            says of itself when asked) and ``verifier`` (gives evidence of what runs here)

    Raises:
        ConfigError: it may not, or cannot, listen there.
    """
    serving = Serving(service, listen, **options)
    try:
        yield serving
    finally:
        serving.stop()
