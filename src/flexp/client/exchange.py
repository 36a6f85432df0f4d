"""One exchange with the server: where it belongs in a step, and how it is one differentiable function.

:class:`RemoteMiddle` is what makes a client's step ordinary PyTorch: blocks [s, e) as one operation of the graph.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flexp.errors import ConfigError, LinkError
from flexp.kinds import ModelKind, share_of
from flexp.links.base import Link
from flexp.links.messages import (
    BackwardReply,
    BackwardRequest,
    ForwardReply,
    ForwardRequest,
    KeptForwardRequest,
)
from flexp.links.packing import Places, pack, sent, unpack
from flexp.rng import Turn, current_turn, resting


@dataclass(frozen=True)
class Piece:
    """One exchange's piece of a step.

    Attributes:
        number: from 1, of ``of`` pieces; ``number + 1`` where it is only known that more will come.
        share: of the step's loss items: what the piece's loss is multiplied with, since a step's loss is a mean.
        tokens: its share of the step's unmasked tokens, which alignment is a mean over.
        weight: its loss items.
        step: the step's number on the link, once the exchange goes up.
        examples: the numbers of its examples, if they have any.
    """

    number: int = 1
    of: int = 1
    share: float = 1.0
    tokens: float = 1.0
    weight: float = 1.0
    step: int = 0
    examples: tuple[int, ...] = ()

    @property
    def last(self) -> bool:
        return self.number == self.of

    @property
    def exchange(self) -> int:
        """The exchange's own number: the same whenever it is sent."""
        return self.step << 16 | self.number


class RemoteMiddle(torch.autograd.Function):
    """Blocks [s, e) on the server: h from z forward, ∂total/∂z from ∂task/∂h backward.

    Inputs are the call, z and, with alignment at every block, the inner activations; all (B, T, H). The alignment
    gradient is part of what comes back, so it needs no term in the loss.
    """

    @staticmethod
    def forward(ctx: Any, call: RemoteCall, z_BTH: Tensor, *inner_BTH: Tensor) -> Tensor:
        ctx.call = call
        return call.forward()

    @staticmethod
    def backward(ctx: Any, grad_BTH: Tensor) -> tuple[Tensor | None, ...]:
        call: RemoteCall = ctx.call
        if call.apart:
            call.send(grad_BTH)
            return (None, None)
        reply = call.backward(grad_BTH)
        return (None, reply.grad_BTH, *reply.inner_BTH)


R = TypeVar("R")
Look = Callable[[ForwardRequest, Tensor, Tensor, Tensor, float], None]


class RemoteCall:
    """One exchange: sent when it is made, waited for when its result is needed.

    ``look`` is shown the request, h, ∂task/∂h and the gradients once it is through. ``own_BTH`` is a gradient at z of
    the client's own, which the server does not see; it is added to what comes back. ``kept`` are the tokens of the
    request's activations that cross; all that this class gives and takes is whole. ``crosses`` is
    sent in the request's place.
    """

    two_way = True

    def __init__(
        self,
        link: Link,
        request: ForwardRequest,
        place: Piece | None,
        *,
        back: bool = True,
        look: Look | None = None,
        own_BTH: Tensor | None = None,
        kept: Places | None = None,
        crosses: KeptForwardRequest | None = None,
    ) -> None:
        self.request = request
        self._own_BTH = own_BTH
        self._kept = kept
        self._reads = kept if request.rows_BT is None else Places.of(request.rows_BT)
        self.back = back  # whether anything below the cut is trained, so that a gradient must come back
        self._look = look
        self._h_BTH: Tensor | None = None  # and what was sent for it, for whoever looks
        self._sent_BTH: Tensor | None = None
        self.align: float | None = None
        self.kept = False  # whether the server keeps the examples that came
        self.answered = False  # whether the backward is through
        self.apart = False  # whether the backward through the tail ends with sending: see flexp.client.overlap
        self._backward: Future[BackwardReply] | None = None
        self._link = link
        self.place = place
        self._turn = current_turn()  # autograd may run the backward in a thread of its own
        crossing = crosses or sent(request, kept)
        with self._waiting():  # a link inside this process computes at once
            self._forward: Future[ForwardReply] = link.call(crossing)

    def through(self, z_BTH: Tensor, *inner_BTH: Tensor) -> Tensor:
        """h as a function of what was sent up."""
        h_BTH: Tensor = RemoteMiddle.apply(self, z_BTH, *inner_BTH)  # type: ignore[no-untyped-call]
        return h_BTH

    def forward(self) -> Tensor:
        """h, (B, T, H), once it is here."""
        reply = self._come(self._forward)
        check_forward_reply(self.request, reply, self._reads)
        self.align, self.kept = reply.align, reply.kept
        h_BTH = unpack(reply.hidden_BTH, self._reads)
        self._h_BTH = None if self._look is None else h_BTH
        return h_BTH

    def backward(self, grad_BTH: Tensor) -> BackwardReply:
        """Send ∂task/∂h and wait for the gradients at what was sent up."""
        self.send(grad_BTH)
        return self.reply()

    def send(self, grad_BTH: Tensor) -> None:
        """Send ∂task/∂h."""
        place = self.place
        if self._backward is not None:
            raise LinkError(
                "a second backward runs through one forward (retain_graph, or autograd.grad before it), and the server "
                "has let go of it; add the losses up, or run the model again"
            )
        if place is None:
            raise LinkError(
                "this forward ran in evaluation mode, so the server kept nothing for a backward: "
                "call model.train() before the forward"
            )
        request = BackwardRequest(
            self.request.exchange,
            pack(grad_BTH.detach(), self._reads),
            place.step,
            place.of,
            place.tokens,
            place.weight,
            self.back,
        )
        self._sent_BTH = None if self._look is None else grad_BTH.detach()
        with self._waiting():
            self._backward = self._link.call(request)

    def reply(self) -> BackwardReply:
        """The gradients at what was sent up, once they are here."""
        assert self._backward is not None
        reply = self._come(self._backward)
        if self.back or reply.grad_BTH is not None:
            check_backward_reply(self.request, reply, self._kept)
            assert reply.grad_BTH is not None
            inner_BTH = [unpack(value, self._kept) for value in reply.inner_BTH]
            reply = BackwardReply(unpack(reply.grad_BTH, self._kept), tuple(inner_BTH))
        if self._look is not None and self.place is not None and reply.grad_BTH is not None:
            assert self._h_BTH is not None
            assert self._sent_BTH is not None
            self._look(self.request, self._h_BTH, self._sent_BTH, reply.grad_BTH, self.place.tokens)
        self.answered = True
        if self._own_BTH is not None and reply.grad_BTH is not None:
            reply = replace(reply, grad_BTH=reply.grad_BTH + self._own_BTH)
        return reply

    @property
    def answer(self) -> Future[Any]:
        """What is waited for: h, or once ∂task/∂h is sent, the gradients."""
        return self._backward or self._forward

    @property
    def here(self) -> bool:
        """Whether that has come."""
        return self.answer.done()

    def _come(self, answer: Future[R]) -> R:
        with self._waiting():
            return answer.result()

    def _waiting(self) -> AbstractContextManager[None]:
        return waiting(self._link, self._turn, train=self.place is not None)


class OneWayCall(RemoteCall):
    """A step's forward that no backward follows (``privacy.gradients = false``): the graph begins with h."""

    two_way = False

    def through(self, z_BTH: Tensor, *inner_BTH: Tensor) -> Tensor:
        return self.forward()


@contextmanager
def waiting(link: Link, turn: Turn | None, *, train: bool = True) -> Iterator[None]:
    """Inside the ``with`` block time is the server's or the link's, not this client's, and so are random numbers."""
    began = time.perf_counter()
    try:
        with resting(turn):
            yield
    finally:
        link.meter.of(train).waited_seconds += time.perf_counter() - began


@dataclass(frozen=True)
class Loop:
    """Somebody else's training loop, as far as it can be asked.

    Attributes:
        ends: whether its optimiser steps after the exchange that comes next.
        group: exchanges in a step, but for shorter groups.
    """

    ends: Callable[[], bool]
    group: int


class Steps:
    """Counts a split model's steps and the exchanges in them.

    Args:
        accumulation: exchanges in a step, for loops that do not say so themselves.

    Attributes:
        numbering: tells these steps from those of another run of the same client; goes on with them.
        done: complete steps.
        piece: what the loop said of the exchange that comes next.
        loop: a loop whose steps these are, for lack of a piece.
    """

    def __init__(self, accumulation: int = 1) -> None:
        self.accumulation = accumulation
        self.numbering = secrets.randbits(62) + 1
        self.done = 0
        self.piece: Piece | None = None
        self.loop: Loop | None = None
        self._number = 0  # of the step, on the link: the same again when a step is tried again
        self._begun = 0  # exchanges of an unfinished step
        self._previous: RemoteCall | None = None

    @contextmanager
    def during(self, piece: Piece) -> Iterator[None]:
        """The exchange that goes up inside the ``with`` block is that piece of a step."""
        self.piece = piece
        try:
            yield
        finally:
            self.piece = None

    def place(self, kind: ModelKind, inputs: Mapping[str, Any]) -> Piece:
        """Where the exchange belongs that goes up now, with this batch."""
        piece = self.piece or self._next(kind, inputs)
        if piece.number == 1:
            self._number = self.done + 1
        if self.piece is None:
            self.done += int(piece.last)
        self._begun = 0 if piece.last else piece.number
        return replace(piece, step=self._number)

    def _next(self, kind: ModelKind, inputs: Mapping[str, Any]) -> Piece:
        """For loops that say nothing. Without ``num_items_in_batch`` their exchanges count alike."""
        number, of = self._begun + 1, self.accumulation
        even = 1.0 / of
        if of == 1 and self.loop is None and accumulates():
            raise ConfigError(
                "accelerate adds up gradients of several batches, and the server would take each for a step: make the "
                "model with accumulation = their number, or use part_of_step"
            )
        if self.loop is not None:
            of = number if self.loop.ends() else number + 1
            even = 1.0 / self.loop.group
        share, weight = share_of(kind, inputs, even)
        return Piece(number, of, share, share, weight)

    def abandon(self) -> None:
        """Begin a new step with the next exchange."""
        self._begun = 0
        self._previous = None

    def remember(self, call: RemoteCall) -> None:
        """For :meth:`refuse_half_steps`."""
        if self.accumulation > 1 or self.loop is not None:
            self._previous = call

    def refuse_half_steps(self, personal: Iterable[nn.Parameter]) -> None:
        """Refuse to go on if the optimiser stepped too early.

        Gradients that were there and are gone show that it did: a fused optimiser leaves no other sign.

        Raises:
            ConfigError: it did.
        """
        if not self._begun or self._previous is None or not self._previous.answered:
            return
        parameters = list(personal)
        if parameters and all(parameter.grad is None for parameter in parameters):
            raise ConfigError(
                f"the optimiser stepped after {self._begun} exchanges of a step (accumulation = {self.accumulation}), "
                "and the server waits for the rest; drop the last, shorter group of an epoch (examples = a multiple of "
                "batch size × accumulation), use part_of_step, or model.abort() to begin a new step"
            )


def accumulates() -> bool:
    """Whether accelerate is adding up gradients right now, for a step of more batches."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return False
    known = state.GradientState()
    return bool(known.num_steps > 1 and not known.sync_gradients)


def check_forward_reply(request: ForwardRequest, reply: ForwardReply, reads: Places | None = None) -> None:
    """Refuse activations that are not finite or not those that were asked for, or an alignment that was not.

    Args:
        reads: the rows that were asked for; ``None``: all.

    Raises:
        LinkError: see above.
    """
    _check_shape(f"the activation of exchange {request.exchange}", reply.hidden_BTH, request.hidden_BTH, reads)
    check_finite(f"the activation of exchange {request.exchange}", reply.hidden_BTH)
    if reply.align is not None and (request.base_BTH is None or not abs(reply.align) < float("inf")):
        raise LinkError(
            f"the server says that exchange {request.exchange} is aligned to {reply.align}, "
            f"{'though nothing was sent for it' if request.base_BTH is None else 'expected a finite number'}"
        )
    if reply.teachers:
        raise LinkError(f"the server answers exchange {request.exchange} with what only another server asks for")


def check_backward_reply(request: ForwardRequest, reply: BackwardReply, kept: Places | None = None) -> None:
    """Refuse gradients that are not finite, or at other activations than those that were sent.

    Args:
        kept: the tokens of them that crossed; ``None``: all.

    Raises:
        LinkError: see above.
    """
    given, sent = len(reply.inner_BTH), len(request.inner_BTH)
    if given != sent:
        raise LinkError(
            f"the server sends gradients at {given} inner activations of exchange {request.exchange}, expected {sent} "
            "as were sent"
        )
    if reply.grad_BTH is None:
        raise LinkError(f"the server sends no gradient of exchange {request.exchange}, and one was asked for")
    for value in (reply.grad_BTH, *reply.inner_BTH):
        _check_shape(f"the gradient of exchange {request.exchange}", value, request.hidden_BTH, kept)
        check_finite(f"the gradient of exchange {request.exchange}", value)


def _check_shape(what: str, value: Tensor, whole_BTH: Tensor, kept: Places | None) -> None:
    shape = tuple(whole_BTH.shape if kept is None else (1, len(kept), whole_BTH.shape[2]))
    if tuple(value.shape) != shape:
        raise LinkError(f"{what} is {tuple(value.shape)}, expected {shape}, as was asked for")


def check_finite(what: str, value: Tensor) -> None:
    """Refuse numbers of a server that are not finite.

    Raises:
        LinkError: see above.
    """
    if not bool(torch.isfinite(value).all()):
        raise LinkError(
            f"the server sends numbers that are not finite: {what}; its shared blocks have diverged (lower "
            "train.shared.lr or train.personal.lr, or use float32), or it is broken"
        )
