"""What a server is sent in a run, recorded where it arrives: after codecs, dropout and whatever else a client does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flexp.client.trainer import Step
from flexp.data.types import Batch
from flexp.errors import ConfigError
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest, ForwardReply, ForwardRequest
from flexp.links.packing import Places, arrived, unpack
from flexp.methods.split import Split

R = TypeVar("R")


@dataclass
class Exchange:
    """What one exchange showed the server, and the truth, which only the owner has.

    Attributes:
        step: of the client, from 1.
        batch: the truth: token ids (B, T) and labels.
        z_BTH: what came up at the client's cut.
        base_BTH: z_base, where alignment or teaching sent it.
        reads: the rows of h that its client read; ``None``: all.
        h_BTH: what went down.
        grad_BTH: ∂task/∂h; ``None`` until the backward has come.
    """

    client: str
    step: int
    batch: Batch
    z_BTH: Tensor
    base_BTH: Tensor | None
    reads: Places | None = None
    h_BTH: Tensor | None = None
    grad_BTH: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """Which places hold a token."""
        return self.batch.get("attention_mask", torch.ones_like(self.batch["input_ids"])).bool()


@dataclass
class Watch:
    """Records a method's training exchanges; :meth:`told` is its ``on_step``.

    Attributes:
        most: exchanges of each client that are kept, the first ones; ``None``: all.
    """

    method: Split
    most: int | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    _open: dict[tuple[str, int], Exchange] = field(default_factory=dict)
    _batches: dict[str, list[Batch]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.method.clients:
            self._look_ahead(name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the ``with`` block everything that reaches the server is seen first."""
        server = self.method.server
        inner = server.answer

        def answer(client: str, request: Request[R]) -> R | Future[R]:
            self._see(client, request)
            reply = inner(client, request)
            if isinstance(request, ForwardRequest) and (client, request.exchange) in self._open:
                exchange = self._open[client, request.exchange]
                exchange.h_BTH = unpack(cast("ForwardReply", reply).hidden_BTH.clone(), exchange.reads)
            return reply

        # Links look the verb up at each call, so shadowing it on this one server is enough.
        vars(server)["answer"] = answer
        try:
            yield
        finally:
            del vars(server)["answer"]

    def told(self, step: Step) -> None:
        """A client's step is over: the next exchanges are of another batch."""
        self._look_ahead(step.client)

    def _look_ahead(self, client: str) -> None:
        self._batches[client] = [batch for _, batch in self.method.clients[client].pieces()]

    def _see(self, client: str, request: Request[Any]) -> None:
        if isinstance(request, ForwardRequest) and request.train:
            batch = self._batches[client].pop(0)
            if self.most is not None and sum(each.client == client for each in self.exchanges) >= self.most:
                return
            request, kept = arrived(request, client)
            reads = kept if request.rows_BT is None else Places.of(request.rows_BT)
            base_BTH = None if request.base_BTH is None else request.base_BTH.clone()
            exchange = Exchange(client, request.step, batch, request.hidden_BTH.clone(), base_BTH, reads)
            self._open[client, request.exchange] = exchange
            self.exchanges.append(exchange)
        elif isinstance(request, BackwardRequest):
            key = (client, request.exchange)
            if key in self._open:
                exchange = self._open.pop(key)
                exchange.grad_BTH = unpack(request.grad_BTH.clone(), exchange.reads)


def unread(method: Any) -> str:
    """What is said instead of what the server can read, where no attack here knows what clients send."""
    said = "sends no activations" if "activations" not in method.sends else "not audited"
    return f"{said} (clients of {method.name!r} send {method.sends})"


def watchable(method: Any) -> Split:
    """The method, if its clients send activations.

    Raises:
        ConfigError: they do not, or their input is no text.
    """
    if not isinstance(method, Split):
        raise ConfigError(f'{unread(method)}; the audit reads activations, of methods such as "flexp-sfl"')
    if method.world.config.link.cache != "off":
        raise ConfigError('the audit reads every exchange whole: set link.cache = "off"; what is kept is no other z')
    if method.world.source.anatomy.image:
        raise ConfigError("the audit reads texts out of activations; images are not audited yet")
    return method
