"""What crosses a link. Nothing else ever does: no token id, label, pixel or personal weight has a place here.

Shapes: B examples, T tokens, H hidden width. Every tensor is detached; every message is a plain value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from torch import Tensor

from flexp.config import AlignConfig, CodecConfig, LoraConfig

What = Literal["step", "evaluate", "save", "restore", "stop"]
Reply = TypeVar("Reply")


class Request(Generic[Reply]):
    """What a client sends. The server answers it with a ``Reply``, or refuses it.

    Attributes:
        reply: the type of its answer.
        trains: whether the tensors of request and reply count as training's or evaluation's; ``None``: it has none.
    """

    reply: ClassVar[type[Any]]
    trains: ClassVar[bool | None] = None

    def __init_subclass__(cls) -> None:
        (cls.reply,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Welcome:
    """The server's answer: the base depth s_min that its shared blocks start at, and what it lets be in flight."""

    base_depth: int
    blocks: int
    hidden: int
    max_in_flight: int = 1


@dataclass(frozen=True)
class Join(Request[Welcome]):
    """A client's first message: who it is, what it keeps, and what it wants the server to do.

    Attributes:
        fingerprint: of the pretrained model (:func:`flexp.models.fingerprint.fingerprint`), which must be the server's.
        cut: (s, e); the server runs blocks [s, e) for this client.
        align: the alignment whose gradient the server is to compute.
        tuning: how the client trains its blocks; the `weights` alignment needs it to be the server's.
        lora: with what adapters, if it says so; they must be the server's if that has any.
        autocast: what it computes matrix products in, if not in ``dtype``; the server does the same.
        weights: which pretrained weights it has (:func:`flexp.models.fingerprint.weights_fingerprint`), if it knows.
        numbering: which run of this client its step numbers belong to, 1 to 2⁶³ − 1; 0: it numbers none. Joining again
            with the same one goes on with the same steps.
        codec: in what form tensors are to cross, both ways; ``None``: as the link does by itself.
    """

    client: str
    fingerprint: str
    cut: tuple[int, int]
    dtype: str
    tuning: str
    align: AlignConfig
    lora: LoraConfig | None = None
    weights: str | None = None
    autocast: str = "off"
    numbering: int = 0
    codec: CodecConfig | None = None


@dataclass(frozen=True)
class ForwardReply:
    """``hidden_BTH``: what comes out of block e−1. ``align``: the alignment term, when it was due."""

    hidden_BTH: Tensor
    align: float | None = None


@dataclass(frozen=True)
class ForwardRequest(Request[ForwardReply]):
    """Run blocks [s, e).

    Attributes:
        exchange: numbers this client's exchanges; a backward names the forward that it belongs to.
        hidden_BTH: the smashed activation z_k.
        mask_BT: the attention mask, if the client uses one.
        positions_BT: explicit positions, if the client uses any.
        base_BTH: z_base, when alignment is due on this exchange.
        inner_BTH: with alignment at every block, the activations after blocks s_min … s−2, in order.
        train: whether a backward will follow.
        step: of the client's steps the one that it belongs to, as in its backward; 0: not numbered.
    """

    trains: ClassVar[bool | None] = True

    exchange: int
    hidden_BTH: Tensor
    mask_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    base_BTH: Tensor | None = None
    inner_BTH: tuple[Tensor, ...] = ()
    train: bool = False
    step: int = 0


@dataclass(frozen=True)
class BackwardReply:
    """``grad_BTH``: ∂total/∂z_k. ``inner_BTH``: gradients at the inner activations, where alignment was due."""

    grad_BTH: Tensor
    inner_BTH: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class BackwardRequest(Request[BackwardReply]):
    """Run blocks [s, e) backward, for an earlier forward.

    Attributes:
        grad_BTH: ∂task/∂h, scaled by what this exchange counts in its step.
        step: numbers this client's steps from 1; one that was applied already is answered, and not applied again. 0:
            not numbered. A step is complete when all of its exchanges have arrived, in whatever order.
        exchanges: how many exchanges the step has: micro-batches share one.
        tokens: this exchange's share of the step's unmasked tokens, 0 < tokens ≤ 1, which its alignment counts.
        weight: how many items (tokens, examples) of the loss this exchange stands for.
    """

    trains: ClassVar[bool | None] = True

    exchange: int
    grad_BTH: Tensor
    step: int = 0
    exchanges: int = 1
    tokens: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class PullReply:
    """The trained shared parameters of the aligned blocks, by their names in the model."""

    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PullRequest(Request[PullReply]):
    """Ask for the shared weights of blocks [start, stop), which lie in [s_min, s), for alignment in weight space.

    ``step`` is the client's step that it ends; 0: not numbered.
    """

    trains: ClassVar[bool | None] = True

    start: int
    stop: int
    step: int = 0


@dataclass(frozen=True)
class FetchReply:
    """Trained shared parameters of one block, by their names in the model.

    Attributes:
        version: how many updates the shared blocks have had; parts of one model must have the same.
        total: how many trained tensors the block has; ``weights`` holds some of them.
    """

    version: int
    total: int
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FetchRequest(Request[FetchReply]):
    """Ask for the trained shared weights of one block: one that the client keeps a copy of itself (to begin with), or
    with the operator's permission one of the blocks [s, e) that the server runs for it.

    Attributes:
        block: its index in the model.
        first: of the block's trained tensors, in the order of their names, the first to send: a large block comes in
            several answers.
        most: bytes of tensors that one answer may have; a single tensor that is larger comes alone.
    """

    trains: ClassVar[bool | None] = False

    block: int
    first: int = 0
    most: int = 64 << 20


@dataclass(frozen=True)
class ExtendReply:
    """``hidden_BTH``: what comes out of block e−1, for the new tokens."""

    hidden_BTH: Tensor


@dataclass(frozen=True)
class ExtendRequest(Request[ExtendReply]):
    """Run blocks [s, e) on the next tokens of an answer, with the keys and values of those before.

    Attributes:
        generation: numbers this client's answers; the server keeps a cache for each.
        past: how many tokens came before, which must be what the server holds; 0 begins anew.
        hidden_BTH: the activations of the new tokens alone.
        mask_BT: of the new tokens alone; an answer that begins with a mask has one all the way.
        positions_BT: explicit positions of the new tokens, if the model takes any.
        rows_B: which row of the cache each row goes on from, where that is not the same one (beam search).
    """

    trains: ClassVar[bool | None] = False

    generation: int
    past: int
    hidden_BTH: Tensor
    mask_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    rows_B: Tensor | None = None


@dataclass(frozen=True)
class Done:
    """The answer to what only makes the server forget something."""


@dataclass(frozen=True)
class EndGeneration(Request[Done]):
    """An answer is complete, or given up: the server forgets its cache, if it has one."""

    generation: int


@dataclass(frozen=True)
class Abort(Request[Done]):
    """Give up all that this client has in flight, and what its unfinished steps have gathered."""


@dataclass(frozen=True)
class Leave(Request[Done]):
    """The client goes; what it has in flight is dropped, and so are its caches."""


@dataclass(frozen=True)
class Order:
    """What a client does next.

    Attributes:
        what: ``step``: ``count`` steps. ``evaluate``: score the personal model after round ``number``. ``save``:
            keep a snapshot with that number. ``restore``: go back to that snapshot. ``stop``: the run is over.
        run: the run's name, the same after a restart of the server.
        place: in the schedule; the client's next :class:`Ready` says that it is done.
        save: with any order, first keep a snapshot with this number.
    """

    what: What
    run: str
    place: int = 0
    number: int = 0
    count: int = 1
    save: int | None = None


@dataclass(frozen=True)
class Ready(Request[Order]):
    """A client waits for its next order.

    Attributes:
        steps: that it has done in all.
        done: the place in the schedule that its last order named, and which is done; ``None``: it has just come.
        run: the run that its snapshots belong to; empty: it has none.
        snapshots: that it holds, by their numbers.
        saved: the steps that its newest snapshot has.
        facts: for the operator: losses, scores, seconds, bytes.
        planned: steps that the whole run has for it, by which its learning rate falls; 0: it does not fall.
    """

    steps: int
    done: int | None = None
    run: str = ""
    snapshots: tuple[int, ...] = ()
    saved: int = 0
    facts: dict[str, float] = field(default_factory=dict)
    planned: int = 0


def tensors(message: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a message, with the name of its field."""
    for item in fields(message):
        value = getattr(message, item.name)
        if isinstance(value, Tensor):
            yield item.name, value
        elif isinstance(value, tuple):
            yield from ((item.name, entry) for entry in value if isinstance(entry, Tensor))
        elif isinstance(value, dict):
            yield from ((f"{item.name}.{key}", entry) for key, entry in value.items() if isinstance(entry, Tensor))


def size(message: Any) -> int:
    """The bytes of a message's tensors, as they cross without a codec (:meth:`flexp.links.coding.Coding.size`)."""
    total = 0
    for name, value in tensors(message):
        # A mask of zeros and ones crosses as one byte an entry, whatever type the model wants it in.
        total += value.numel() * (1 if name == "mask_BT" else value.element_size())
    return total
