"""The remote middle as one differentiable function: what makes a client's step ordinary PyTorch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from flexp.client.steps import Place
from flexp.errors import LinkError
from flexp.links.base import Link
from flexp.links.messages import BackwardReply, BackwardRequest, ForwardReply, ForwardRequest
from flexp.rng import Turn, current_turn, resting


class RemoteCall:
    """One exchange: sent when it is made, waited for when its result is needed."""

    def __init__(self, link: Link, request: ForwardRequest, place: Place | None) -> None:
        self.request = request
        self.align: float | None = None
        self.answered = False  # whether the backward is through
        self.apart = False  # whether the backward through the tail ends with sending: see flexp.client.overlap
        self._backward: Future[BackwardReply] | None = None
        self._link = link
        self._place = place
        self._turn = current_turn()  # autograd may run the backward in a thread of its own
        with self._waiting():  # a link inside this process computes at once
            self._forward: Future[ForwardReply] = link.call(request)

    def forward(self) -> Tensor:
        """h, (B, T, H), once it is here."""
        with self._waiting():
            reply = self._forward.result()
        self.align = reply.align
        return reply.hidden_BTH

    def backward(self, grad_BTH: Tensor) -> BackwardReply:
        """Send ∂task/∂h and wait for the gradients at what was sent up."""
        self.send(grad_BTH)
        return self.reply()

    def send(self, grad_BTH: Tensor) -> None:
        """Send ∂task/∂h."""
        place = self._place
        if place is None:
            raise LinkError(
                "this forward ran in evaluation mode, so the server kept nothing for a backward: "
                "call model.train() before the forward"
            )
        request = BackwardRequest(
            self.request.exchange, grad_BTH.detach(), place.step, place.exchanges, place.tokens, place.weight
        )
        with self._waiting():
            self._backward = self._link.call(request)

    def reply(self) -> BackwardReply:
        """The gradients at what was sent up, once they are here."""
        assert self._backward is not None
        with self._waiting():
            reply = self._backward.result()
        self.answered = True
        return reply

    @property
    def answer(self) -> Future[Any]:
        """What is waited for: h, or once ∂task/∂h is sent, the gradients."""
        return self._backward or self._forward

    @property
    def here(self) -> bool:
        """Whether that has come."""
        return self.answer.done()

    def _waiting(self) -> AbstractContextManager[None]:
        return waiting(self._link, self._turn, train=self.request.train)


@contextmanager
def waiting(link: Link, turn: Turn | None, *, train: bool = True) -> Iterator[None]:
    """Inside the ``with`` block time is the server's or the link's, not this client's, and so are random numbers."""
    began = time.perf_counter()
    try:
        with resting(turn):
            yield
    finally:
        link.meter.of(train).waited_seconds += time.perf_counter() - began


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
        inner = reply.inner_BTH or (None,) * len(call.request.inner_BTH)
        return (None, reply.grad_BTH, *inner)
