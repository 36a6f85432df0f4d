"""What a client asks for beside its exchanges: weights, sums over all clients, the next tokens of an answer
(:mod:`flexp.links.messages`)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from flexp.links.declaring import INTEGERS, MASK, POSITIONS, ROWS, WEIGHTS, Count, Integer, Request, hidden, message
from flexp.links.messages import Done


@message
class PullReply:
    """The trained shared parameters of the aligned blocks, by their names in the model.

    Attributes:
        total: how many there are; ``weights`` holds some of them.
        same: others of them, which the client said it has.
    """

    total: Integer
    same: tuple[str, ...] = ()
    weights: Annotated[dict[str, Tensor], WEIGHTS] = field(default_factory=dict)


@message
class PullRequest(Request[PullReply]):
    """Ask for the shared weights of blocks [start, stop), which lie in [s_min, s), for alignment in weight space.

    Attributes:
        step: the client's step that it ends, whose pulls all have the same weights; 0: not numbered.
        first, most: as in :class:`FetchRequest`.
        known: of tensors of which the client holds copies, by their names, the fingerprints
            (:func:`flexp.models.fingerprint.tensor_fingerprint`): what has the same does not come. Who was cut off in
            the middle names what has come.
    """

    trains: ClassVar[bool | None] = True

    start: Integer
    stop: Integer
    step: Integer = 0
    first: Integer = 0
    most: Integer = 64 << 20
    known: dict[str, str] = field(default_factory=dict)


OF_A_MEETING = 3
"""Sums of a meeting, the first one's from 0 and the last one's behind them."""
KEYS, SEALED = 6, 7
"""The sums with which clients agree on a key: notes alone."""
PIECES = 1 << 16
"""Sums of a round: how many examples all have, then pieces of their average: p of round r (1, 2, …) is r · 2¹⁶ + p."""
PIECE = 1 << 17
"""Numbers of a piece, 1 MiB: a server holds one of every client, and no link takes frames of any size."""


@message
class SumReply:
    """``values_N``: what the clients of the run gave under the request's number, added up modulo 2⁶⁴; ``notes``: what
    each said with it, by its name."""

    values_N: Annotated[Tensor | None, INTEGERS] = None
    notes: dict[str, str] = field(default_factory=dict)


@message
class SumRequest(Request[SumReply]):
    """Give integers to be added up over all clients of the run, modulo 2⁶⁴, with a note for all of them.

    What they stand for is the clients' business (:mod:`flexp.client.adding`: fixed-point numbers under masks; public
    keys). The answer comes when all have given theirs. The server sums in runs alone whose configuration says that
    clients meet, or that their weights are averaged.

    Attributes:
        number: which sum; asked again, it is the same one. From 2¹⁶ on they belong to averages.
    """

    trains: ClassVar[bool | None] = True
    waits: ClassVar[bool] = True

    number: Count
    values_N: Annotated[Tensor | None, INTEGERS] = None
    note: Annotated[str, Field(max_length=1 << 16)] = ""


@message
class FetchReply:
    """Trained shared parameters of one block, by their names in the model.

    Attributes:
        version: how many updates the shared blocks have had; parts of one model must have the same.
        total: how many trained tensors the block has; ``weights`` holds some of them.
        same: others of them, which the client said it has.
    """

    version: Integer
    total: Integer
    same: tuple[str, ...] = ()
    weights: Annotated[dict[str, Tensor], WEIGHTS] = field(default_factory=dict)


@message
class FetchRequest(Request[FetchReply]):
    """Ask for the trained shared weights of one block: one that the client keeps a copy of itself (to begin with), or
    with the operator's permission one of the blocks [s, e) that the server runs for it.

    Attributes:
        block: its index in the model.
        first: of the block's trained tensors, in the order of their names, the first to send: a large block comes in
            several answers.
        known: as in :class:`PullRequest`.
        most: bytes of tensors that one answer may have; a single tensor that is larger comes alone.
    """

    trains: ClassVar[bool | None] = False

    block: Integer
    first: Integer = 0
    most: Integer = 64 << 20
    known: dict[str, str] = field(default_factory=dict)


@message
class ExtendReply:
    """``hidden_BTH``: what comes out of block e−1, for the new tokens."""

    hidden_BTH: Annotated[Tensor, hidden()]


@message
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

    generation: Integer
    past: Integer
    hidden_BTH: Annotated[Tensor, hidden()]
    mask_BT: Annotated[Tensor | None, MASK] = None
    positions_BT: Annotated[Tensor | None, POSITIONS] = None
    rows_B: Annotated[Tensor | None, ROWS] = None


@message
class EndGeneration(Request[Done]):
    """An answer is complete, or given up: the server forgets its cache, if it has one."""

    generation: Integer
