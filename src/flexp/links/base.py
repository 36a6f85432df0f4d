"""The link: all that a client sees of the server.

Whatever carries the messages, the code above it is the same. A call gives a future at once, so that several exchanges
of one client may be in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flexp.links.messages import (
    Abort,
    BackwardReply,
    BackwardRequest,
    EndGeneration,
    ExtendReply,
    ExtendRequest,
    FetchReply,
    FetchRequest,
    ForwardReply,
    ForwardRequest,
    Join,
    PullReply,
    PullRequest,
    Welcome,
)


@dataclass
class Traffic:
    """Bytes of tensors each way, exchanges, and the seconds that the other side computed and the client waited."""

    bytes_up: int = 0
    bytes_down: int = 0
    exchanges: int = 0
    server_seconds: float = 0.0
    waited_seconds: float = 0.0


@dataclass
class Meter:
    """What one client's link carried, counted where it happens; training apart from evaluation."""

    training: Traffic = field(default_factory=Traffic)
    evaluation: Traffic = field(default_factory=Traffic)

    def of(self, train: bool) -> Traffic:
        """The account of training or of evaluation."""
        return self.training if train else self.evaluation

    def state(self) -> dict[str, dict[str, float]]:
        """All counts, JSON-ready."""
        return {"training": asdict(self.training), "evaluation": asdict(self.evaluation)}

    def load(self, state: dict[str, dict[str, float]]) -> None:
        """Continue from :meth:`state`."""
        self.training = Traffic(**state["training"])  # type: ignore[arg-type]
        self.evaluation = Traffic(**state["evaluation"])  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """All counts as a checkpoint holds them, flat and exact."""
        return {
            f"meter/{kind}/{name}": torch.tensor(value, dtype=torch.float64)
            for kind, counts in self.state().items()
            for name, value in counts.items()
        }

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`tensors`, which may stand among others."""
        found = self.state()
        for kind, counts in found.items():
            for name, zero in counts.items():
                counts[name] = type(zero)(state[f"meter/{kind}/{name}"])
        self.load(found)


@runtime_checkable
class Link(Protocol):
    """Carries exchanges between one client and the server.

    Raises:
        LinkError: from every call, or from its future, when the server refuses or cannot be reached.
    """

    meter: Meter

    @property
    def client(self) -> str:
        """The name of the client whose link this is."""
        ...

    def join(self, request: Join) -> Welcome:
        """Agree on model, cut and alignment; before anything else, and again to change the cut."""
        ...

    def forward(self, request: ForwardRequest) -> Future[ForwardReply]:
        """Blocks [s, e) forward."""
        ...

    def backward(self, request: BackwardRequest) -> Future[BackwardReply]:
        """Blocks [s, e) backward."""
        ...

    def pull(self, request: PullRequest) -> Future[PullReply]:
        """The shared weights of the aligned blocks."""
        ...

    def abort(self, request: Abort) -> None:
        """Give up what is in flight and every unfinished step; their exchanges have no backward any more."""
        ...

    def extend(self, request: ExtendRequest) -> Future[ExtendReply]:
        """Blocks [s, e) on the next tokens of an answer."""
        ...

    def end_generation(self, request: EndGeneration) -> None:
        """Let the server forget the cache of an answer; nothing happens where there is none."""
        ...

    def fetch(self, request: FetchRequest) -> Future[FetchReply]:
        """The trained shared weights of one of the blocks [s, e), if the operator gives them."""
        ...

    def close(self) -> None:
        """Leave; what is in flight is dropped, caches are."""
        ...


@contextmanager
def connected(link: Link) -> Iterator[Link]:
    """Close ``link`` when the ``with`` block ends."""
    try:
        yield link
    finally:
        link.close()


def as_link(link: Link | str) -> Link:
    """``link``, or what a URL with the client's name in it leads to: ``grpc://clinic-a@HOST:PORT``.

    A query makes the network in between slower than it is (:mod:`flexp.links.emulated_url`).

    Raises:
        ConfigError, LinkError: as :func:`flexp.connect`.
    """
    if not isinstance(link, str):
        return link
    from flexp.links.emulated import EmulatedLink  # these only for those who use them
    from flexp.links.emulated_url import split_url
    from flexp.links.grpc import connect

    address, network = split_url(link)
    far: Link = connect(address)
    return far if network is None else EmulatedLink(far, network)
