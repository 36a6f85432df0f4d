"""What can be chosen for a device, and what an exchange or a step of it costs, counted or predicted."""

from __future__ import annotations

from dataclasses import dataclass

from flexp.errors import ConfigError
from flexp.registry import CODECS

ALIASES = {"none": "off", "fp32": "off", "int8": "int8-channel"}
"""Other names for codecs in fleets and plans."""


def form(codec: str) -> str:
    """What a run's configuration calls ``codec``."""
    return ALIASES.get(codec, codec)


def codec_names() -> list[str]:
    """What :attr:`Choice.codec` may be."""
    return list(dict.fromkeys([*ALIASES, "off", *CODECS]))


def codec_share(codec: str) -> float:
    """Bytes of an activation on the wire ÷ those of float32; 1 where it crosses as it is."""
    name = form(codec)
    return 1.0 if name == "off" else float(CODECS[name].share)


def codec_loss(codec: str) -> float:
    """What rounding is taken to cost, as a fraction of accuracy."""
    name = form(codec)
    return 0.0 if name == "off" else float(CODECS[name].accuracy_loss)


@dataclass(frozen=True)
class Choice:
    """How one client trains.

    Attributes:
        cut: (s, e); the server runs blocks [s, e).
        micro_batch: examples of one exchange.
        accumulation: exchanges of one step, so that a step has ``micro_batch · accumulation`` examples.
        checkpointing: whether the client's own blocks run again in the backward instead of keeping their activations.
        rank: of the LoRA adapters; ``None``: full tuning.
        codec: of what crosses the link, one of :func:`codec_names`.
    """

    cut: tuple[int, int]
    micro_batch: int
    accumulation: int = 1
    checkpointing: bool = False
    rank: int | None = None
    codec: str = "none"

    def __post_init__(self) -> None:
        start, stop = self.cut
        if not 0 <= start < stop:
            raise ConfigError(f"cut = ({start}, {stop}) is none: expected 0 <= s < e, the server runs blocks [s, e)")
        if self.micro_batch < 1 or self.accumulation < 1 or (self.rank is not None and self.rank < 1):
            raise ConfigError(f"{self}: micro_batch, accumulation and rank are at least 1")
        if form(self.codec) != "off" and form(self.codec) not in CODECS:
            raise ConfigError(f"codec {self.codec!r} is not known: expected one of {', '.join(codec_names())}")


@dataclass(frozen=True)
class Prediction:
    """What one step of a client with some :class:`Choice` takes.

    Attributes:
        memory_bytes: the client's peak, above the bare interpreter.
        step_seconds: client, link and an idle server, one after the other.
        client_seconds: the client's own computing.
        server_seconds: the server's computing for this client; waiting in a queue is not in it.
        link_seconds: latency and transmission of all messages of the step.
        energy_joules: a proxy: assumed watts while computing and while transmitting, times the seconds.
        bytes_up: tensors from the client to the server; ``bytes_down`` back.
        server_memory_bytes: what the server holds for this client while its exchange is in flight, without the shared
            weights themselves (:meth:`flexp.cost.model_cost.ModelCost.server_weights`).
        host_bytes: of a client that computes on a GPU, what its machine's own memory must hold: its weights, which are
            loaded there first, what crosses, and what is no tensor. It was compared with no GPU.
    """

    memory_bytes: int
    step_seconds: float
    client_seconds: float
    server_seconds: float
    link_seconds: float
    energy_joules: float
    bytes_up: int
    bytes_down: int
    server_memory_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True)
class ExchangeCost:
    """One exchange of a client, forward and backward.

    A step is ``exchanges`` times: compute ``before``, exchange, compute ``between``, exchange, compute ``after``.
    Without a server ``before`` is all there is.

    Attributes:
        before, between, after: the client's floating-point operations.
        server_forward, server_backward: the server's.
        forward_up, forward_down, backward_up, backward_down: bytes.
        pull_down: bytes of the shared weights that the client fetches now and then.
        combined: one visit of the server: the labels go up with the forward and the gradient comes back, or h does and
            no gradient goes up; ``backward_down`` is what comes, and there is nothing ``between``.
        weights: bytes of what the client trains.
        later_before, later_up: in place of ``before`` and ``forward_up`` once the server keeps the examples
            (``link.cache``): after ``epoch`` steps; ``None``: it keeps none.
    """

    before: float
    between: float = 0.0
    after: float = 0.0
    server_forward: float = 0.0
    server_backward: float = 0.0
    forward_up: float = 0.0
    forward_down: float = 0.0
    backward_up: float = 0.0
    backward_down: float = 0.0
    pull_down: float = 0.0
    combined: bool = False
    weights: float = 0.0
    exchanges: int = 1
    later_before: float = 0.0
    later_up: float | None = None
    epoch: int = 0

    def sent_anew(self, steps: int) -> float:
        """Of a client's first ``steps`` steps those whose examples its server does not know."""
        return steps if self.later_up is None else min(steps, self.epoch)

    @property
    def client_step(self) -> float:
        """The client's operations in a step."""
        return (self.before + self.between + self.after) * self.exchanges

    @property
    def server_step(self) -> float:
        """The server's operations for a step of this client."""
        return (self.server_forward + self.server_backward) * self.exchanges
