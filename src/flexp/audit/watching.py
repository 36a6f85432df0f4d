"""What a server is sent in a run, recorded where it arrives: after codecs, dropout and whatever else a client does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexp.client.averaging import MASKED, READABLE
from flexp.client.trainer import Trainer, split_model_of
from flexp.config import RunConfig
from flexp.data.types import Batch, Task
from flexp.errors import ConfigError
from flexp.links.base import Link
from flexp.links.declaring import Request
from flexp.links.messages import BackwardRequest, ForwardRequest, KeptForwardRequest
from flexp.links.packing import Places, arrived, unpack
from flexp.links.wrapping import Wrapping
from flexp.methods.parties import own_stage
from flexp.methods.split import Split
from flexp.models.anatomy import Part
from flexp.models.stage import Stage
from flexp.server.examples import Examples

FORWARDS = ForwardRequest | KeptForwardRequest
R = TypeVar("R")


@dataclass
class Exchange:
    """What one exchange showed the server, and the truth, which only the owner has.

    Attributes:
        step: of the client, from 1.
        batch: the truth: token ids (B, T) and labels.
        cut: (s, e).
        z_BTH: what came up at the client's cut.
        base_depth: s_min, and ``base_BTH``: z_base, where alignment or teaching sent it.
        reads: the rows of h that its client read; ``None``: all.
        h_BTH: what went down.
        grad_BTH: ∂task/∂h; ``None`` until the backward has come.
        share: of its step's loss items, which a step of several exchanges is a mean over.
    """

    client: str
    step: int
    batch: Batch
    cut: tuple[int, int]
    z_BTH: Tensor
    base_depth: int
    base_BTH: Tensor | None
    reads: Places | None = None
    h_BTH: Tensor | None = None
    grad_BTH: Tensor | None = None
    share: float = 1.0

    @property
    def mask(self) -> Tensor:
        """Which places hold a token."""
        return self.batch.get("attention_mask", torch.ones_like(self.batch["input_ids"])).bool()

    def of_tokens(self, value_BTH: Tensor) -> Tensor:
        """What crossed, with the one vector of a pooled text in the place of each of its tokens."""
        return value_BTH.expand(-1, self.mask.shape[1], -1) if value_BTH.shape[1] == 1 else value_BTH


@dataclass(frozen=True)
class Known:
    """What an audit needs to know of a run besides.

    Attributes:
        source: the pretrained model, or the ends and blocks of it that clients have.
        surrogate: a head of so many blocks as clients have theirs before they teach it.
        method: with its server; ``None``: that is another machine's.
        unheard: what a server has and was not recorded here, so that nobody takes it for safe.
    """

    config: RunConfig
    task: Task
    source: Stage
    surrogate: Callable[[int], Stage]
    method: Split | None = None
    unheard: Sequence[str] = ()


@dataclass
class Watch:
    """Records training exchanges, in main memory.

    Attributes:
        trainers: the clients' loops, which know what they send.
        known: asked when the attacks begin.
        most: exchanges of each client that are kept, the first ones; ``None``: all.
        failed: what went wrong in watching; no exchange fails for it.
    """

    trainers: Mapping[str, Trainer]
    known: Callable[[], Known]
    most: int | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    failed: Exception | None = None
    _kept: dict[str, Examples] = field(default_factory=dict)  # that cross once, by client
    _open: dict[tuple[str, int], Exchange] = field(default_factory=dict)
    # step, exchange, what is to come of the step: each one's share and batch
    _next: dict[str, tuple[int, int, list[tuple[float, Batch]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, method: Split, most: int | None = None) -> Watch:
        """Of all clients of a simulation."""
        world = method.world

        def surrogate(depth: int) -> Stage:
            blocks = world.source.anatomy.blocks
            return own_stage(world, Part.client((depth, blocks), blocks))

        known = Known(world.config, world.federation.task, world.source, surrogate, method)
        return cls(method.clients, lambda: known, most)

    def forget(self) -> None:
        """Let go of what was recorded, and record no more, whatever links are open still tell."""
        self.most = 0
        self.exchanges.clear()
        self._open.clear()
        self._kept.clear()

    def see(self, client: str, request: Request[Any]) -> None:
        """A request on its way to the server."""
        with self._harmless():
            if isinstance(request, FORWARDS) and (request.train or request.step > 0):
                self._forward(client, request)
            elif isinstance(request, BackwardRequest) and (client, request.exchange) in self._open:
                exchange = self._open.pop((client, request.exchange))
                exchange.grad_BTH = exchange.of_tokens(unpack(_copied(request.grad_BTH), exchange.reads))

    def answered(self, client: str, request: Request[Any], reply: Any) -> None:
        """What the server said to it."""
        with self._harmless():
            if isinstance(request, FORWARDS) and (client, request.exchange) in self._open:
                exchange = self._open[client, request.exchange]
                exchange.h_BTH = exchange.of_tokens(unpack(_copied(reply.hidden_BTH), exchange.reads))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Training needs nothing of what is watched, so it does not end where that fails."""
        try:
            yield
        except Exception as error:  # of any kind
            self.forget()
            self.failed = self.failed or error

    def _forward(self, client: str, request: ForwardRequest | KeptForwardRequest) -> None:
        trainer = self.trainers[client]
        step, last, pieces = self._next.get(client, (-1, 0, []))
        if step != trainer.steps or request.exchange <= last:  # a new step, or one that is done again
            pieces = [(piece.share, batch) for piece, batch in trainer.pieces()]
        (share, batch), *later = pieces
        self._next[client] = trainer.steps, request.exchange, later
        if self.most is not None and sum(each.client == client for each in self.exchanges) >= self.most:
            return
        if isinstance(request, KeptForwardRequest):
            whole, kept = self._whole(client, request)
        else:
            whole, kept = arrived(request, client)
        reads = kept if whole.rows_BT is None else Places.of(whole.rows_BT)
        base_BTH = None if whole.base_BTH is None else _copied(whole.base_BTH)
        model = split_model_of(trainer)
        exchange = Exchange(
            client, request.step, batch, model.cut, _copied(whole.hidden_BTH), model.base_depth, base_BTH, reads,
            share=share,
        )  # fmt: skip
        exchange.z_BTH = exchange.of_tokens(exchange.z_BTH)
        self._open[client, request.exchange] = exchange
        self.exchanges.append(exchange)

    def _whole(self, client: str, request: KeptForwardRequest) -> tuple[ForwardRequest, Places | None]:
        """A forward of examples some of which came earlier, as a server puts it together."""
        examples, mask_BT = self._kept.setdefault(client, Examples()), request.mask_BT.cpu()
        fresh = None if request.hidden_BTH is None else _copied(request.hidden_BTH)
        whole, new = examples.whole(replace(request, hidden_BTH=fresh, mask_BT=mask_BT), client)
        examples.keep(new, sys.maxsize)
        return whole, Places.of(mask_BT)


def _copied(value: Tensor) -> Tensor:
    """In main memory, where attacks compare it, and where it takes none from training."""
    return value.detach().to("cpu", copy=True)


@contextmanager
def watching(method: Split, watch: Watch) -> Iterator[None]:
    """Inside the ``with`` block everything that reaches a simulation's server is seen first."""
    server = method.server
    inner = server.answer

    def answer(client: str, request: Request[R]) -> R | Future[R]:
        watch.see(client, request)
        reply = inner(client, request)
        watch.answered(client, request, reply)
        return reply

    # Links look the verb up at each call, so shadowing it on this one server is enough.
    vars(server)["answer"] = answer
    try:
        yield
    finally:
        del vars(server)["answer"]


class Watched(Wrapping):
    """A client's own link: ``watch`` sees what goes through it, before a codec rounds it."""

    def __init__(self, inner: Link, watch: Watch) -> None:
        super().__init__(inner)
        self._watch = watch

    def call(self, request: Request[R]) -> Future[R]:
        self._watch.see(self.client, request)
        future = self.inner.call(request)

        def came(done: Future[R]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._watch.answered(self.client, request, done.result())

        future.add_done_callback(came)
        return future


def unread(method: Any, config: RunConfig) -> str:
    """What is said instead of what the server can read, where no attack here knows what clients send."""
    said = "sends no activations" if "activations" not in method.sends else "not audited"
    said = f"{said} (clients of {method.name!r} send {method.sends})"
    if method.deployed is None or not method.deployed.averages:
        return said
    masked = config.method.meet.masked
    return f"{said}; over a network {MASKED if masked else READABLE}"


def watchable(method: Any) -> Split:
    """The method, if its clients send activations.

    Raises:
        ConfigError: they do not, or as :func:`check_watchable`.
    """
    if not isinstance(method, Split):
        said = unread(method, method.world.config)
        raise ConfigError(f'{said}; the audit reads activations, of methods such as "flexp-sfl"')
    check_watchable(images=method.world.source.anatomy.image)
    return method


def check_watchable(*, images: bool) -> None:
    """Refuse what no attack reads.

    Raises:
        ConfigError: clients' input is no text.
    """
    if images:
        raise ConfigError("the audit reads texts out of activations; images are not audited yet")
