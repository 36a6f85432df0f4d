"""A step of which several exchanges are under way at once.

An exchange is: head forward here, blocks [s, e) there, tail here (forward, and backward down to h), blocks [s, e)
backward there, head backward here. In one piece, ``loss.backward()`` waits for the server in its middle. Here the
tail's backward ends at h and sends its gradient, and the head's backward starts at z when the answer has come; in
between other exchanges of the step go on. What each computes is the same, and in the same order, whatever is in flight:
so are the sums of gradients, here and on the server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexp.client.exchange import Piece, waiting
from flexp.client.model import Sent, SplitModel
from flexp.data.types import Batch
from flexp.errors import LinkError
from flexp.rng import current_turn


@dataclass(frozen=True)
class Done:
    """One exchange's loss (a mean over its items) and alignment term."""

    piece: Piece
    loss: float
    align: float | None


def overlapped(
    model: SplitModel,
    pieces: Sequence[tuple[Piece, Batch]],
    most: int,
    check: Callable[[Tensor], None],
    loss_of: Callable[[Any, Mapping[str, Any]], Tensor] = lambda output, _: output.loss,
) -> Iterator[Done]:
    """Run a step's exchanges with up to ``most`` of them under way, or as many as the server lets be.

    Gradients are in the parameters once the iterator is at its end. What the server waits for goes first: a tail, which
    ends in sending a gradient, before another head's forward, and that before a head's backward, for which nobody
    waits.

    Args:
        check: raises if a loss is not finite.
        loss_of: the loss of an output and its batch.

    Raises:
        LinkError: the server refused, or cannot be reached; the step is given up, on the server as well.
    """
    most = min(most, model.max_in_flight)
    fresh = deque(pieces)
    at_server: deque[tuple[Piece, Sent]] = deque()  # sent z, wait for h
    returning: deque[Sent] = deque()  # sent ∂task/∂h, wait for ∂total/∂z
    try:
        while fresh or at_server or returning:
            if at_server and at_server[0][1].call.here:
                piece, sent = at_server.popleft()
                output = model.tail(sent, apart=True)
                loss = loss_of(output, sent.inputs)
                check(loss)
                torch.autograd.backward(loss * piece.share)  # tail only; sends ∂task/∂h
                if sent.call.two_way:
                    returning.append(sent)
                yield Done(piece, loss.item(), sent.call.align)
            elif fresh and len(at_server) + len(returning) < most:
                piece, batch = fresh.popleft()
                with model.steps.during(piece):
                    at_server.append((piece, model.head(batch)))
            elif returning and returning[0].call.here:
                _finish(returning.popleft())
            else:
                answers = [sent.call.answer for sent in [*(sent for _, sent in at_server), *returning]]
                with waiting(model.link, current_turn()):
                    wait(answers, return_when=FIRST_COMPLETED)
        model.steps.done += 1
    except BaseException:
        with suppress(LinkError):  # the first failure is the one to tell
            model.abort()
        raise


def _finish(sent: Sent) -> None:
    """The head's backward, from the gradients that have come."""
    reply = sent.call.reply()
    ends = [(sent.z_BTH, reply.grad_BTH), *zip(sent.inner_BTH, reply.inner_BTH, strict=False)]
    needed = [(value, grad) for value, grad in ends if value.grad_fn is not None]
    if needed:
        torch.autograd.backward([value for value, _ in needed], [grad for _, grad in needed])
