"""What a server says to the next one, which holds further blocks (:mod:`flexp.links.messages`)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar

from torch import Tensor

from flexp.links.declaring import Count, Integer, Request, Tensors, hidden, message


@message
class PassedReply:
    """The answer of a server that runs the blocks further on, which has applied nothing yet.

    Attributes:
        grad_BTH: at the activation that came; ``base_BTH``: at what came to be taught.
        names, norms_N: the gradients of its trained tensors of this exchange, and of the servers behind it.
        all_names, all_N: likewise of the step's exchanges so far, added up.
    """

    grad_BTH: Annotated[Tensor, hidden()]
    base_BTH: Annotated[Tensor | None, hidden()] = None
    names: tuple[str, ...] = ()
    norms_N: Annotated[Tensor | None, Tensors()] = None
    all_names: tuple[str, ...] = ()
    all_N: Annotated[Tensor | None, Tensors()] = None


@message
class PassedBackward(Request[PassedReply]):
    """A :class:`BackwardRequest` from one server to the next: its gradient is kept until a :class:`Settle` says what
    becomes of the step. ``base_BTH``: what the blocks before, where they are taught, made of z_base."""

    trains: ClassVar[bool | None] = True

    exchange: Integer
    grad_BTH: Annotated[Tensor, hidden()]
    base_BTH: Annotated[Tensor | None, Tensors()] = None
    step: Integer = 0
    exchanges: Integer = 1
    tokens: float = 1.0
    weight: float = 1.0


@message
class Behind:
    """What the servers further on say to the one before them.

    Attributes:
        end: behind the last block that they hold.
        run, snapshots: whose snapshots all of them hold, and which.
        names, norms_N: what an update is to come to that waits for its norm.
        facts: of each, by its blocks: counts for the operator.
    """

    end: Count = 0
    run: str = ""
    snapshots: tuple[Integer, ...] = ()
    names: tuple[str, ...] = ()
    norms_N: Annotated[Tensor | None, Tensors()] = None
    facts: dict[str, dict[str, float]] = field(default_factory=dict)


@message
class Lead(Request[Behind]):
    """The first word of the server before: the ``settings`` that must be the same here, by their names, and its
    ``run``, which comes later from one that is led itself, and goes on to the servers behind."""

    settings: dict[str, str] = field(default_factory=dict)
    run: str = ""


@message
class Settle(Request[Behind]):
    """A client's step is complete and judged.

    Attributes:
        client, step: whose gradient, kept since :class:`PassedBackward`; none is, where the client's cut ends before.
        take: whether it is to train the blocks; otherwise it is dropped. Without ``client``: what the update rule has
            gathered is to train them now.
        weight, scale: as the update rule has it; the gradient is scaled first.
        norm: of the whole update, which is then applied; ``None``: it is asked for, and comes with :class:`Update`.
    """

    trains: ClassVar[bool | None] = True

    client: str
    step: Integer = 0
    take: bool = True
    reaches: bool = True
    weight: float = 1.0
    scale: float | None = None
    norm: float | None = None


@message
class Update(Request[Behind]):
    """Apply what waits for its norm."""

    trains: ClassVar[bool | None] = True

    norm: float


@message
class Keep(Request[Behind]):
    """Save the state as snapshot ``number`` of ``run``, or go ``back`` to it; ``over``: the run has ended.

    Attributes:
        held: snapshots that the first server has: others may go.
    """

    number: Integer = -1
    run: str = ""
    held: tuple[Integer, ...] = ()
    back: bool = False
    over: bool = False
