"""A client's exchanges: when a request is answered, and a forward and its backward from their checks to their answers.

Read from top to bottom: :meth:`Exchanges.answer`, then the handler of its request.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from flexp.errors import FullError, LinkError, StoppedError
from flexp.limits import out_of_memory
from flexp.links.base import waiting_thread
from flexp.links.declaring import Request
from flexp.links.messages import (
    BackwardReply,
    BackwardRequest,
    Done,
    ForwardReply,
    ForwardRequest,
    KeptForwardRequest,
    Ready,
)
from flexp.links.packing import Places, arrived
from flexp.server.checks import alike, check_backward, check_finite, check_forward, same_exchange
from flexp.server.clients import Key
from flexp.server.led import Led, compared
from flexp.server.session import Session
from flexp.server.turns import STOPS, R, Steps, handles

FULL = (
    "client {}: the server's memory ran out at a {}; do the step again with less at a time (train.micro_batch), or "
    "give the server more"
)


class Exchanges(Led):
    """Answers requests as they arrive, one at a time.

    Attributes:
        sealed: the run is over: clients use and fetch what there is, and nobody trains. (A step that the shared blocks
            have taken already is answered again.)
    """

    sealed = False

    def answer(self, client: str, request: Request[R]) -> R | Future[R]:
        """Answer a request of a client; all but :class:`Join` and :class:`Leave` need it to have joined.

        Raises:
            LinkError: the request does not go with this server, with what was agreed on joining, or with what is in
                flight; it has no effect then.
        """
        if self.stops and not issubclass(request.reply, Done):
            raise StoppedError(STOPS)
        if isinstance(request, Ready):
            return cast("Future[R]", self._next_order(client, request))
        with self._lock:
            broken = self.own.get(client, self.shared).broken
            if broken and not issubclass(request.reply, Done):
                raise LinkError(broken)
            if self._must_wait(client, request):
                return self._line_up(client, request)
            try:
                return cast(R, self._now(client, request))
            finally:
                if self._line.waiting and waiting_thread() is not None:  # a link calls work() itself
                    self._work_off()

    def _must_wait(self, client: str, request: Request[Any]) -> bool:
        """Whether a request goes into the line: it may be answered together with others, which only links wait for, or
        it is a forward that would be one too many, or hold one version of the weights too many.

        A client that holds something never waits, nor does one whose thread holds some, since it would wait for itself;
        so everything is let go at last.
        """
        session = self._sessions.get(client)
        if session is None:
            return False
        together = self.config.joined and not self.shared.frozen
        if together and waiting_thread() is None and isinstance(request, ForwardRequest | BackwardRequest):
            return True
        if not isinstance(request, ForwardRequest | KeptForwardRequest) or not request.train:
            return False
        session.thread = waiting_thread()
        if len(session.pending) >= self.config.max_in_flight:  # it is refused
            return False
        if session.pending or (session.may_begin(self._sessions.in_flight) and not self._line.waiting):
            return False
        if session.thread in {other.thread for other in self._sessions.values() if other.pending} - {None}:
            return False
        self._work_off()
        return len(self._line.waiting) > 0 or not session.may_begin(self._sessions.in_flight)

    def _now(self, client: str, request: Request[Any]) -> Any:
        if issubclass(request.reply, Done):  # it only makes the server forget, which nobody is refused
            return self._handle(request, client)
        try:
            if client in self.own:
                self.blocks_of(client)
            with self.guard.request(client), nullcontext() if request.trains is None else self._computing():
                return self._finished(client, self._handle(request, client))
        except (MemoryError, RuntimeError) as error:
            if out_of_memory(error) is None:
                raise
        for session in self._sessions.values():  # not within the above, where the error holds what it computed
            session.shed()
        raise FullError(FULL.format(client, type(request).__name__))

    def _finished(self, client: str, made: Any) -> Any:
        """What a handler gives; where it waits for the servers further on, a future, and it goes on later."""
        if not isinstance(made, Generator):
            return made
        value, waited = driven(made)
        if waited is None:
            return value
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()

        def go_on(come: Future[Any]) -> None:
            try:
                with self._lock:
                    try:
                        with self.guard.judged(client), self._computing():
                            value, waited = driven(made, come)
                    finally:
                        self._work_off()
            except Exception as error:
                answer.set_exception(error)
                return
            if waited is None:
                answer.set_result(value)
            else:
                waited.add_done_callback(later)

        def later(come: Future[Any]) -> None:
            self.submit(lambda: go_on(come))

        waited.add_done_callback(later)
        return answer

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the seconds, and let none of the caller's modes in, which a link to another process would not carry.

        A backward in the same process, for instance, arrives with gradients switched off, a Trainer's forward perhaps
        with mixed precision switched on.
        """
        began, device = time.perf_counter(), self.shared.stage.model.device
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                yield
        finally:
            self.compute_seconds += time.perf_counter() - began

    def _drop_late(self) -> None:
        """Give up what is in flight for too long: sooner, where somebody in line waits for what it holds."""
        wanted = bool(self._line.waiting) and self._held_up()
        for session in self._sessions.values():
            session.drop_late(session.patience if wanted else self.config.exchange_seconds)

    def _remember(self, session: Session, step: int, key: Key, reply: Any) -> None:
        if self.remembers:
            session.progress.remember(step, key, reply, self.config.keep_answers_bytes)

    @handles.register
    def _forward(self, request: ForwardRequest, client: str) -> Steps[ForwardReply]:
        session = self._sessions[client]
        known = self._known_forward(session, request)
        if known is not None:
            return known
        return (yield from self._run(session, *arrived(request, f"client {client}")))

    def _known_forward(self, session: Session, request: ForwardRequest) -> ForwardReply | None:
        """What was answered to it, if it comes again and its step was applied."""
        known = session.progress.answer(request.step, ("forward", request.exchange)) if request.train else None
        if known is None or not session.progress.applied(request.step):
            return None
        return known if same_exchange(session, request, known) else None

    @handles.register
    def _kept_forward(self, request: KeptForwardRequest, client: str) -> Steps[ForwardReply]:
        """A forward of examples some of which are here."""
        session = self._sessions[client]
        whole, new = session.examples.whole(request, client)
        reads = whole.mask_BT if whole.rows_BT is None else whole.rows_BT
        known = session.progress.answer(request.step, ("forward", request.exchange))
        if known is not None and session.progress.applied(request.step):
            assert reads is not None
            if known.hidden_BTH.shape[1] == int(reads.sum()):
                return cast(ForwardReply, replace(known, kept=self._keep(session, new)))
        assert whole.mask_BT is not None
        reply = yield from self._run(session, whole, Places.of(whole.mask_BT))
        return replace(reply, kept=self._keep(session, new))

    def _keep(self, session: Session, new: dict[int, Tensor]) -> bool:
        held = sum(other.examples.bytes for other in self._sessions.values())
        return session.examples.keep(new, self.config.max_examples_bytes - held)

    def _run(self, session: Session, request: ForwardRequest, sent: Places | None) -> Steps[ForwardReply]:
        """A forward with whole activations, of which ``sent`` crossed."""
        self._check(session, request, self._sessions.in_flight)
        with session.random.active():
            reply = session.forward(request, sent)
        if request.train and self.config.joined:
            self._together.drew(session.drew)
        if session.further is not None:
            base_BTH = reply.teachers[-1] if reply.teachers and session.aligned_further else None
            passed = replace(request, hidden_BTH=reply.hidden_BTH, base_BTH=base_BTH, inner_BTH=())
            there = yield from self._further(session, passed)
            reply = replace(reply, hidden_BTH=there.hidden_BTH)
            if base_BTH is not None:
                reply = compared(session, request.exchange, reply, there.teachers)
        if request.train:  # else it can be computed again at any time
            self._remember(session, request.step, ("forward", request.exchange), reply)
        return reply

    def _check(self, session: Session, request: ForwardRequest, in_flight: int) -> None:
        client, trains = session.join.client, request.train or request.step > 0
        self._drop_late()
        check_forward(session, request, self.shared.stage, in_flight)
        if trains and self.sealed and not session.progress.applied(request.step):
            raise LinkError(f"client {client}: the run is over, and this server trains no more")
        if trains and self.following is None:  # without training nothing but its own answer comes of it
            check_finite(client, request)

    @handles.register
    def _backward(self, request: BackwardRequest, client: str) -> Steps[BackwardReply]:
        """Blocks [s, e) backward, and the update that follows."""
        session, key = self._sessions[client], ("backward", request.exchange)
        known = session.progress.answer(request.step, key)
        complete = request.exchange not in session.pending
        answered = session.progress.answer(request.step, ("forward", request.exchange))
        fits = known is not None and answered is not None and alike(request.grad_BTH, answered.hidden_BTH)
        if fits and complete:
            return cast(BackwardReply, known)
        if self.following is not None:
            raise LinkError(f"client {client}: this server trains as the server before says")
        pending, behind = check_backward(session, request), None
        if session.further is not None:
            request, behind = yield from self._passed(session, pending, request)
        with session.random.active():
            reply = session.backward(request, behind)
        self._remember(session, request.step, key, reply)
        if session.settled is not None:
            yield session.settled
        return reply


def driven(work: Steps[R], come: Future[Any] | None = None) -> tuple[R | None, Future[Any] | None]:
    """Let a handler go on with what has ``come`` until it has ended, or waits for something that is not there yet; what
    it gives, or what it waits for."""
    while True:
        try:
            if come is None:
                waited = next(work)
            elif (error := come.exception()) is not None:
                waited = work.throw(error)
            else:
                waited = work.send(come.result())
        except StopIteration as end:
            return end.value, None
        if not waited.done():
            return None, waited
        come = waited
