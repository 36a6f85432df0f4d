"""What a client's exchange costs: floating-point operations, counted on a real step, and the bytes of its messages.

A simulation asks what the method computed that it has run, whatever that was: the client's own model and the server's
make one step, and :func:`flexp.cost.counting.counting` looks on. The planner asks before anything is loaded, of every
cut at once, so it counts a model's pieces instead (:mod:`flexp.cost.model_cost`). A test holds the two to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from statistics import fmean
from typing import Any, TypeVar

import torch

from flexp.client.exchange import Piece
from flexp.client.personal import WholeModel
from flexp.client.trainer import BatchOrder
from flexp.config import TrainConfig
from flexp.cost.choice import ExchangeCost
from flexp.cost.counting import counting
from flexp.cost.echo import EchoLink, client_model, random_batch, without_tail
from flexp.cost.probe import Probe
from flexp.kinds import LABELS
from flexp.links.asking import PullRequest
from flexp.links.declaring import Request, size
from flexp.links.messages import BackwardRequest, ForwardRequest, Join, KeptForwardRequest
from flexp.models.stage import Stage
from flexp.server import Server

R = TypeVar("R")


def count_exchange(
    probe: Probe, stage: Stage, server: Server | None = None, only: Collection[str] | None = None
) -> ExchangeCost:
    """Count one exchange of a client, which runs for it once.

    Args:
        probe: what the client is: its cut, alignment and base depth, and the size of its exchange.
        stage: its own, tuned. Of a client without a tail that of the whole model: the server computes what is behind s.
        server: its blocks [s_min, e), for a client with a tail.
        only: of a whole model just these weights are trained.
    """
    if probe.cut is None:
        return _whole(probe, stage, only)
    if not probe.tail:
        return _start(probe, stage)
    assert server is not None
    return _split(probe, stage, server)


def mean_shape(config: TrainConfig, lengths: Sequence[int], seed: int) -> tuple[int, int, int]:
    """Examples and tokens of a client's mean exchange over its first epoch, rounded, and exchanges in a step.

    Args:
        lengths: tokens of each of its examples.
        seed: of the order of its examples.
    """
    micro = config.micro_batch or config.batch_size
    order = BatchOrder(len(lengths), config.batch_size, seed)
    steps = [order.indices(step) for step in range(order.steps_per_epoch)]
    groups = [step[start : start + micro] for step in steps for start in range(0, len(step), micro)]
    longest = [max(lengths[index] for index in group) for group in groups]
    return round(fmean(map(len, groups))), round(fmean(longest)), max(1, round(len(groups) / len(steps)))


def _whole(probe: Probe, stage: Stage, only: Collection[str] | None) -> ExchangeCost:
    for name, value in stage.trainable().items():
        value.requires_grad_(only is None or name in only)
    model = WholeModel(stage).train(True)
    batch = random_batch(probe, stage.model.config)
    with counting() as flops:
        model(**batch).loss.backward()
        return ExchangeCost(before=flops(), weights=_bytes(stage.trainable()))


def _split(probe: Probe, stage: Stage, server: Server) -> ExchangeCost:
    """Client and server each on their own: the server gets the very messages that the client sent to an echo."""
    model = client_model(probe, stage, _CountingLink).train(True)
    link: _CountingLink = model.link
    batch = random_batch(probe, stage.model.config)
    with torch.no_grad():
        model.eval()(**batch)  # the first batch of all shows which rows the head reads
    model.train(True)
    link.forget()
    numbered = Piece(examples=tuple(range(probe.examples)))
    with counting() as flops, model.part_of_step(numbered):
        link.flops = flops
        model(**batch).loss.backward()
        total = flops()
    keeps = isinstance(link.requests[0], KeptForwardRequest)
    if keeps:  # once more, as in later epochs
        with counting() as flops, model.part_of_step(numbered):
            link.flops = flops
            model.head(batch)
    model.steps.done = model.align.every if model.align.kind == "weights" else model.steps.done  # a pull is due
    model.after_step()
    server.answer(link.client, link.joined)
    with counting() as flops:
        server.answer(link.client, link.requests[0])
        server_forward = flops()
        if model.gradients:
            server.answer(link.client, link.requests[1])
        server_backward = flops() - server_forward
    if not model.gradients:  # h comes down, and all the rest is the client's
        return ExchangeCost(
            before=link.marks[0],
            after=total - link.marks[0],
            server_forward=server_forward,
            forward_up=link.up[0],
            backward_down=link.down[0],
            combined=True,
            weights=_bytes(stage.trainable()),
        )
    return ExchangeCost(
        before=link.marks[0],
        between=link.marks[1] - link.marks[0],
        after=total - link.marks[1],
        server_forward=server_forward,
        server_backward=server_backward,
        forward_up=link.up[0],
        forward_down=link.down[0],
        backward_up=link.up[1],
        backward_down=link.down[1],
        pull_down=link.pulled,
        weights=_bytes(stage.trainable()),
        later_before=link.marks[2] if keeps else 0.0,
        later_up=link.up[2] if keeps else None,
    )


def _start(probe: Probe, stage: Stage) -> ExchangeCost:
    """A client that ends at s, and a server that has all that follows, the loss included."""
    assert probe.cut is not None
    start, blocks = probe.cut[0], stage.anatomy.blocks
    stage.model.train(True)
    batch = random_batch(probe, stage.model.config)
    with counting() as flops:
        embedded_BTH, plan = stage.plan(batch)
        z_BTH = stage.run(embedded_BTH, plan, 0, start)
        before = flops()
        sent_BTH = z_BTH.detach().requires_grad_()
        loss = stage.finish(stage.run(sent_BTH, plan, start, blocks), batch, plan).loss
        server_forward = flops() - before
        torch.autograd.backward(loss)
        server = flops() - before
        if z_BTH.requires_grad:
            torch.autograd.backward(z_BTH, sent_BTH.grad)
        total = flops()
    list(without_tail(stage))
    own = {name: value for name, value in stage.trainable().items() if (stage.block_of(name) or 0) < start}
    labels, mask = {key: value for key, value in batch.items() if key in LABELS}, batch.get("attention_mask")
    return ExchangeCost(
        before=before,
        after=total - before - server,  # what is left is the way back through [0, s)
        server_forward=server_forward,
        server_backward=server - server_forward,
        forward_up=_bytes({"z": z_BTH, **labels}) + (0 if mask is None else mask.numel()),
        backward_down=_bytes({"z": z_BTH}),
        combined=True,
        weights=_bytes(own),
    )


class _CountingLink(EchoLink):
    """An echo that keeps what it was sent, and what had been computed by then."""

    flops: Callable[[], float] = staticmethod(lambda: 0.0)

    def __init__(self, blocks: int, hidden: int, base_depth: int) -> None:
        super().__init__(blocks, hidden, base_depth)
        self.forget()

    def forget(self) -> None:
        """What was sent so far does not count."""
        self.marks: list[float] = []
        self.requests: list[Any] = []
        self.up: list[int] = []
        self.down: list[int] = []
        self.pulled = 0

    def call(self, request: Request[R]) -> Future[R]:
        reply = super().call(request)
        match request:
            case Join():
                self.joined = request
            case ForwardRequest() | KeptForwardRequest() | BackwardRequest():
                self.marks.append(self.flops())
                self.requests.append(request)
                self.up.append(size(request))
                self.down.append(size(reply.result()))
            case PullRequest():
                self.pulled = size(reply.result())
        return reply


def _bytes(tensors: dict[str, Any]) -> int:
    values: list[torch.Tensor] = list(tensors.values())
    return sum(value.numel() * value.element_size() for value in values)
