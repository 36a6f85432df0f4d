"""What a step costs: floating-point operations counted on a real step, and the bytes of its messages.

torch's ``FlopCounterMode`` sees the matrix products and convolutions that really run, forward and backward, with
whatever is frozen, adapted, recomputed or aligned; a product of (m × k) and (k × n) is 2mkn. Attention is counted as
the products it is made of: the fused kernels of a CPU are invisible to the counter, so they are switched off meanwhile.
Element-wise work and optimisers count nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexp.client.whole import WholeModel
from flexp.cost.echo import EchoLink, client_model, random_batch, without_tail
from flexp.cost.probe import Probe
from flexp.data.ordering import BatchOrder
from flexp.data.types import ClientData
from flexp.links.messages import size
from flexp.methods.base import World, base_depth
from flexp.methods.parties import client_seed, own_stage, own_world, with_model
from flexp.models.parts import Part
from flexp.models.stage import carve
from flexp.models.tuning import tune
from flexp.server import Server


@dataclass(frozen=True)
class ExchangeCost:
    """One exchange of a client, forward and backward; the names are those of :class:`flexp.cost.clock.ClientWork`.

    Attributes:
        weights: bytes of what the client trains.
        exchanges: in a step.
    """

    before: float
    between: float = 0.0
    after: float = 0.0
    server_forward: float = 0.0
    server_backward: float = 0.0
    forward_up: int = 0
    forward_down: int = 0
    backward_up: int = 0
    backward_down: int = 0
    pull_down: int = 0
    combined: bool = False
    weights: int = 0
    exchanges: int = 1

    @property
    def client_step(self) -> float:
        """The client's operations in a step."""
        return (self.before + self.between + self.after) * self.exchanges

    @property
    def server_step(self) -> float:
        """The server's operations for a step of this client."""
        return (self.server_forward + self.server_backward) * self.exchanges


class Costs:
    """Counts once for each distinct cut, rank and batch shape of a run's clients."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.part = world.method.held.part
        self._known: dict[Any, ExchangeCost] = {}
        self._clients = {data.name: data for data in world.federation.clients}

    def of(self, client: str, only: Collection[str] | None = None) -> ExchangeCost:
        """An exchange of ``client`` at its mean shape; ``only``: of a whole model of which just these weights train."""
        world = own_world(self.world, client) if self.part == "ends" else self.world
        examples, length, exchanges = mean_shape(world, self._clients[client])
        cut = None if self.part == "whole" else self.world.cuts[client]
        own = self.world.adapters(client)
        again = world.config.model.gradient_checkpointing
        key = (cut, examples, length, own.lora.rank, again, None if only is None else frozenset(only))
        if key not in self._known:
            probe = Probe(
                model="",
                kind=self.world.federation.task.model_kind,
                cut=cut,
                examples=examples,
                length=length,
                labels=None,
                model_config={"tuning": self.world.config.model.tuning},
                optimizer={},
                tail=self.part != "start",
                ranks=tuple(own.beside.items()),
            )
            self._known[key] = self._count(with_model(world, lora=own.lora), probe, only)
        return replace(self._known[key], exchanges=exchanges)

    def _count(self, world: World, probe: Probe, only: Collection[str] | None) -> ExchangeCost:
        if probe.cut is None:
            return _whole(world, probe, only)
        return _split(world, probe) if probe.tail else _start(world, probe)


def mean_shape(world: World, client: ClientData) -> tuple[int, int, int]:
    """Examples and tokens of a client's mean exchange over its first epoch, rounded, and exchanges in a step."""
    config = world.config.train
    micro = config.micro_batch or config.batch_size
    order = BatchOrder(len(client.train), config.batch_size, client_seed(world.config.seed, client.name))
    steps = [order.indices(step) for step in range(order.steps_per_epoch)]
    groups = [step[start : start + micro] for step in steps for start in range(0, len(step), micro)]
    lengths = [max(len(client.train[index].get("input_ids", (0,))) for index in group) for group in groups]
    return round(fmean(map(len, groups))), round(fmean(lengths)), max(1, round(len(groups) / len(steps)))


@contextmanager
def counting() -> Iterator[Callable[[], float]]:
    """Inside the ``with`` block: the floating-point operations so far."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter.get_total_flops


class _NoModules:
    """Instead of the counter's ledger by module, which cannot follow ``torch.autograd.grad``."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def _whole(world: World, probe: Probe, only: Collection[str] | None) -> ExchangeCost:
    stage = own_stage(world, Part.whole(world.source.anatomy.blocks))
    for name, value in stage.trainable().items():
        value.requires_grad_(only is None or name in only)
    model = WholeModel(stage).train(True)
    batch = random_batch(probe, stage.model.config)
    with counting() as flops:
        model(**batch).loss.backward()
        return ExchangeCost(before=flops(), weights=_bytes(stage.trainable()))


def _split(world: World, probe: Probe) -> ExchangeCost:
    """Client and server each on their own: the server gets the very messages that the client sent to an echo."""
    config = world.config
    aligned = world.method.aligns
    assert probe.cut is not None
    base = base_depth(config, world.cuts) if aligned else probe.cut[0]
    align = config.method.align.model_dump(mode="json") if aligned else None
    stage = own_stage(world, Part.client(probe.cut, world.source.anatomy.blocks), dict(probe.ranks))
    model = client_model(replace(probe, align=align, base_depth=base), stage, _CountingLink).train(True)
    link: _CountingLink = model.link
    batch = random_batch(probe, stage.model.config)
    with counting() as flops:
        link.flops = flops
        model(**batch).loss.backward()
        total = flops()
    model.steps.done = model.align.every if model.align.kind == "weights" else model.steps.done  # a pull is due
    model.after_step()
    forward, backward = link.requests
    server = _server(world, (base, probe.cut[1]))
    server.join(link.client, link.joined)
    with counting() as flops:
        server.forward(link.client, forward)
        server_forward = flops()
        server.backward(link.client, backward)
        server_backward = flops() - server_forward
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
    )


def _start(world: World, probe: Probe) -> ExchangeCost:
    """A client that ends at s, and a server that has all that follows, the loss included."""
    assert probe.cut is not None
    start, blocks = probe.cut[0], world.source.anatomy.blocks
    stage = own_stage(world, Part.whole(blocks))
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
    labels, mask = batch["labels"], batch.get("attention_mask")
    return ExchangeCost(
        before=before,
        after=total - before - server,  # what is left is the way back through [0, s)
        server_forward=server_forward,
        server_backward=server - server_forward,
        forward_up=_bytes({"z": z_BTH, "labels": labels}) + (0 if mask is None else mask.numel()),
        backward_down=_bytes({"z": z_BTH}),
        combined=True,
        weights=_bytes(own),
    )


def _server(world: World, blocks: tuple[int, int]) -> Server:
    config = world.config
    stage = carve(world.source, Part.server(*blocks))
    tuning = config.server.tuning or config.model.tuning
    tune(stage, config.model, tuning, seed=config.seed)
    return Server(stage, tuning=tuning, config=config.server, optimizer=config.train.shared)


class _CountingLink(EchoLink):
    """An echo that keeps what it was sent, and what had been computed by then."""

    flops: Callable[[], float]

    def __init__(self, blocks: int, hidden: int, base_depth: int) -> None:
        super().__init__(blocks, hidden, base_depth)
        self.marks: list[float] = []
        self.requests: list[Any] = []
        self.up: list[int] = []
        self.down: list[int] = []
        self.pulled = 0

    def join(self, request: Any) -> Any:
        self.joined = request
        return super().join(request)

    def forward(self, request: Any) -> Future[Any]:
        return self._keep(request, super().forward(request))

    def backward(self, request: Any) -> Future[Any]:
        return self._keep(request, super().backward(request))

    def pull(self, request: Any) -> Future[Any]:
        reply = super().pull(request)
        self.pulled = size(reply.result())
        return reply

    def _keep(self, request: Any, reply: Future[Any]) -> Future[Any]:
        self.marks.append(self.flops())
        self.requests.append(request)
        self.up.append(size(request))
        self.down.append(size(reply.result()))
        return reply


def _bytes(tensors: dict[str, Any]) -> int:
    values: list[torch.Tensor] = list(tensors.values())
    return sum(value.numel() * value.element_size() for value in values)
