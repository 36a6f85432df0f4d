"""What a server keeps of a client until its backwards come: forwards with their graphs, steps of which some exchanges
have arrived, and how many bytes all of that takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexp.config import ServerConfig
from flexp.errors import LinkError
from flexp.links.base import Link
from flexp.links.messages import Abort, BackwardRequest, ForwardRequest, Join
from flexp.links.packing import Places
from flexp.links.passing import PassedBackward, PassedReply
from flexp.optim import merged, norms
from flexp.server.clients import Progress

if TYPE_CHECKING:
    from flexp.server.joining import Pass
    from flexp.server.session import Session
    from flexp.server.shared import SharedBlocks


@dataclass
class Pending:
    """A forward whose backward has not come yet.

    ``output_BTH`` holds the graph; with memory = "recompute", or where the graph has no room, it is ``None`` and the
    input and the mask are kept instead. ``bytes`` are all of it, ``since`` in seconds of the monotonic clock. ``sent``
    are the tokens that crossed of z, ``reads`` those of h; ``None``: all.
    """

    request: ForwardRequest  # on the blocks' device
    version: int
    input_BTH: Tensor
    output_BTH: Tensor | None
    align_BTH: list[Tensor]
    bytes: int = 0
    since: float = field(default_factory=time.monotonic)
    sent: Places | None = None
    reads: Places | None = None
    joint: Pass | None = None  # the pass of several clients that it was part of, with their graph


@dataclass
class Gathered:
    """A client's step of which some exchanges have arrived: the sum of their gradients, and of their items.

    ``exchanges``: that it has, as far as its client has said. ``further``: the servers further on have a part of it.
    """

    exchanges: int = 0
    further: bool = False
    arrived: int = 0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    @property
    def bytes(self) -> int:
        return bytes_of(*self.gradients.values())

    def norms(self, behind: PassedReply | None) -> tuple[tuple[str, ...], Tensor]:
        """Of its gradients by their names, with those that the servers further on have of it."""
        names = sorted(self.gradients)
        own_N = norms([self.gradients[name] for name in names]) if names else torch.zeros(0)
        further = behind or PassedReply(own_N)
        return merged(names, own_N, further.all_names, further.all_N)

    def take(self, gradients: dict[str, Tensor], request: BackwardRequest | PassedBackward) -> bool:
        """Add an exchange's gradients; gives whether the step is complete."""
        for name, value in gradients.items():
            self.gradients[name] = self.gradients[name] + value if name in self.gradients else value
        self.weight += request.weight
        self.arrived += 1
        self.exchanges = request.exchanges
        return self.arrived == self.exchanges


@dataclass
class InFlight:
    """What is in flight of a client that has joined."""

    join: Join
    shared: SharedBlocks
    config: ServerConfig
    progress: Progress
    pending: dict[int, Pending] = field(default_factory=dict)
    gathered: dict[int, Gathered] = field(default_factory=dict)
    peers: Mapping[str, InFlight] = field(default_factory=dict)  # of all clients, this one among them
    late: dict[int, float] = field(default_factory=dict)  # exchanges given up, since no backward came; since when
    drops: int = 0  # how often what is in flight was given up
    passing: Counter[int] = field(default_factory=Counter)  # by step, exchanges whose backward is further on
    further: Link | None = None  # the client's link to the servers further on, if its cut needs them
    lined: int = 0  # bytes of its requests that are in line

    @property
    def kept_bytes(self) -> int:
        """What it holds until backwards come: activations with their graphs, the gradients of unfinished steps, and
        what waits in line."""
        kept = sum(one.bytes for one in self.pending.values()) + sum(one.bytes for one in self.gathered.values())
        return kept + self.lined

    @property
    def share_bytes(self) -> int:
        """Of ``server.max_kept_bytes``, what is this client's in any case."""
        return self.config.max_kept_bytes // max(2, len(self.peers))

    def has_room(self, size: int, *, graph: bool) -> bool:
        """Whether so many more bytes may be kept.

        Args:
            graph: they are a graph's, which could be made again: it must be within this client's share, and within what
                all may keep. Inputs may be either.
        """
        own = self.kept_bytes + size <= self.share_bytes
        both = sum(one.kept_bytes for one in self.peers.values()) + size <= self.config.max_kept_bytes
        return own and both if graph else own or both

    def may_begin(self, in_flight: int) -> bool:
        """Whether it may be the next, after so many forwards of all clients in flight: there is room for one more, and
        for the version of the weights that it would hold. Who holds something goes on, or all could wait for each
        other; so ``max_in_flight_total`` is where nobody else begins."""
        return bool(self.pending) or (in_flight < self.config.max_in_flight_total and self.shared.has_room)

    @property
    def patience(self) -> float:
        """Seconds that it may hold what others wait for."""
        return min(self.config.exchange_seconds, max(self.config.hold_seconds, 2 * self.progress.slow))

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return bool(self.pending or self.gathered)

    def take(self, exchange: int) -> Pending:
        """An exchange whose gradients are here; its weights are let go of."""
        pending = self.pending.pop(exchange)
        self.progress.held(pending.since)
        self.shared.release(pending.version)
        return pending

    def shed(self) -> None:
        """Let go of the graphs, since memory ran out: the blocks run again for their backwards."""
        for one in self.pending.values():
            if one.joint is not None:
                one.joint.free()
            one.input_BTH, one.output_BTH = one.request.hidden_BTH.detach(), None
            one.bytes = size_kept(one.request) + bytes_of(*one.align_BTH)

    def drop(self) -> None:
        """Forget what is in flight, and every unfinished step."""
        self.progress.give_up(self.progress.unapplied())
        for pending in self.pending.values():
            self.shared.release(pending.version)
        self.drops += 1
        self.pending.clear()
        self.gathered.clear()
        if self.further is not None:
            self.further.call(Abort())

    def drop_late(self, seconds: float) -> None:
        """Give up everything that is in flight if a backward has not come in so long."""
        if self.is_late(seconds):
            oldest = time.monotonic() - seconds
            self.late = {number: pending.since for number, pending in self.pending.items() if pending.since < oldest}
            self.drop()

    def is_late(self, seconds: float) -> bool:
        """Whether a backward has not come in so long, here or to the servers further on."""
        oldest = time.monotonic() - seconds
        return any(one.since < oldest and not self.passing[one.request.step] for one in self.pending.values())


class Sessions(dict[str, "Session"]):
    """By name. Who asks for one that is not there is told that the client has not joined.

    Raises:
        LinkError: from ``sessions[client]``, see above.
    """

    def __missing__(self, client: str) -> Session:
        raise LinkError(f"client {client} has not joined: Join comes first")

    @property
    def in_flight(self) -> int:
        """Forwards of all clients whose backward has not come yet."""
        return sum(len(session.pending) for session in self.values())

    def end(self, client: str) -> None:
        """Close a client's session, if it has one, and drop what it has in flight."""
        session = self.pop(client, None)
        if session is not None:
            session.drop()

    def refuse_busy(self, what: str) -> None:
        """Refuse to have the server ``what`` (saved, restored, frozen) in the middle of a step.

        Raises:
            LinkError: a client has begun a step and not ended it.
        """
        busy = [name for name, session in self.items() if session.busy]
        if busy:
            raise LinkError(f"the server cannot be {what} in the middle of a step of {', '.join(busy)}")


def size_kept(request: ForwardRequest) -> int:
    """The bytes that a forward keeps in any case."""
    given = (request.hidden_BTH, request.mask_BT, request.positions_BT, request.base_BTH, *request.inner_BTH)
    return bytes_of(*given)


class Kept:
    """Bytes that autograd keeps of a forward, without the weights: they are there anyway."""

    def __init__(self, model: nn.Module, *, keep: bool = True) -> None:
        self.keep = keep
        self._weights = {_place(value) for values in (model.parameters(), model.buffers()) for value in values}
        self._found: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """Every storage once, however many nodes of the graph keep a view of it."""
        return sum(self._found.values())

    def pack(self, value: Tensor) -> Tensor | None:
        """Autograd is about to keep ``value``."""
        if not self.keep:
            return None
        place = _place(value)
        if place not in self._weights:
            self._found[place] = value.untyped_storage().nbytes()
        return value.detach()  # an output that its own node keeps would never be freed


@contextmanager
def counted(model: nn.Module, *, keep: bool = True) -> Iterator[Kept]:
    """Count what autograd keeps of the forwards of ``model`` inside the ``with`` block; or let it keep nothing, so that
    no backward can follow."""
    kept = Kept(model, keep=keep)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _same):
        yield kept


def bytes_of(*values: Any) -> int:
    """Of tensors; what is none counts nothing."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _same(value: Tensor) -> Tensor:
    return value


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
