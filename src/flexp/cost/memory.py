"""How many bytes a step takes, on a client and on its server, counted for each moment of its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexp.cost.choice import Choice
from flexp.cost.model_cost import STATE, ModelCost, PieceCost, ShapeCost
from flexp.models.anatomy import check_cut

OVERHEAD = 20 * 2**20
"""Bytes that are no tensor, where they were not measured: a model's code, what libraries and the allocator keep."""
ADAPTERS = 6 * 2**20
"""The same of the code that only LoRA needs; :data:`CHECKPOINTING`: only checkpointing."""
CHECKPOINTING = 7 * 2**20


def memory(
    cost: ModelCost,
    choice: Choice,
    *,
    overhead_bytes: int | None = None,
    base: bool = False,
    followed: int | None = None,
    frozen: int = 0,
) -> int:
    """The client's peak in bytes above the bare interpreter, once the optimiser has its state.

    It depends on no device but for ``overhead_bytes`` (``None``: :data:`OVERHEAD`); ``base``: z_base is sent as well;
    ``followed``: the first block of its head that it does not train; ``frozen``: so many of its first that it does not.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.cut(start, choice.micro_batch, choice.rank, choice.checkpointing)
    head = _head(cost, choice, shape, followed, frozen)
    tail = list(shape.blocks[stop:])
    held, trained = _own(cost, shape, head, tail)
    gathered = choice.accumulation > 1  # then gradients of the exchanges before are there all the time
    held += shape.input_bytes + (trained if gathered else 0)
    # What crossed: h is memory of its own, and so is z_base where it is not z.
    crossed = shape.message_bytes * (2 if base else 1)
    peak = _walk(held, [shape.embed, *head], crossed, [*tail, shape.head], gathered)
    if followed is not None:  # pulled when a step is over; whoever trains has had room for gradients of that size
        peak = max(peak, held + sum(piece.trained_bytes for piece in shape.blocks[followed:start]))
    return peak + overhead(choice.rank, choice.checkpointing, overhead_bytes)


def resting(
    cost: ModelCost,
    choice: Choice,
    *,
    overhead_bytes: int | None = None,
    followed: int | None = None,
    frozen: int = 0,
    state: bool = True,
) -> int:
    """What the client holds between two steps: weights, optimiser state (or not: ``state``), and what is no tensor. See
    :func:`memory`.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.cut(start, choice.micro_batch, choice.rank, choice.checkpointing)
    held, trained = _own(cost, shape, _head(cost, choice, shape, followed, frozen), list(shape.blocks[stop:]))
    if not state:
        held -= STATE[cost.optimizer] * trained
    return held + overhead(choice.rank, choice.checkpointing, overhead_bytes)


def _own(cost: ModelCost, shape: ShapeCost, head: list[PieceCost], tail: list[PieceCost]) -> tuple[int, int]:
    """Bytes of the client's weights with their optimiser's state, and of those weights that it trains."""
    own = [*head, *tail, shape.head]
    trained = sum(piece.trained_bytes for piece in own)
    weights = sum(piece.weight_bytes for piece in own)
    if cost.config.blocks == "file":  # one block's are there at a time
        frozen = [piece.weight_bytes - piece.trained_bytes for piece in (*head, *tail)]
        weights -= sum(frozen) - max(frozen, default=0)
    return weights + STATE[cost.optimizer] * trained, trained


def overhead(rank: int | None, checkpointing: bool, measured: int | None = None) -> int:
    """Bytes that are no tensor; ``measured``: on the device, with full tuning and without checkpointing."""
    base = OVERHEAD if measured is None else measured
    return base + (0 if rank is None else ADAPTERS) + (CHECKPOINTING if checkpointing else 0)


def server_memory(cost: ModelCost, choice: Choice) -> int:
    """What a server that keeps its activations holds for a client besides weights: most during the backward."""
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.cut(start, choice.micro_batch, choice.rank)
    return _walk(shape.message_bytes + shape.mask_bytes, [], 0, list(shape.blocks[start:stop]), False)


def adapters_bytes(cost: ModelCost, choice: Choice) -> int:
    """A client's own adapters in the server's blocks [s, e), with their optimiser's state (``server.adapters``)."""
    start, stop = check_cut(choice.cut, cost.blocks)
    trained = sum(piece.trained_bytes for piece in cost.at(choice.micro_batch, choice.rank).blocks[start:stop])
    return (1 + STATE[cost.optimizer]) * trained


def _walk(held: int, below: Sequence[PieceCost], crossed: int, above: Sequence[PieceCost], gathered: bool) -> int:
    """The most bytes at any moment of a forward through ``below``, a link, and ``above``, and of the way back."""
    live = peak = held
    for pieces, more in ((below, crossed), (above, 0)):
        for piece in pieces:
            live += piece.kept_bytes
            peak = max(peak, live + piece.forward_extra)
        live += more
        peak = max(peak, live)
    for pieces, more in ((above, crossed), (below, 0)):
        for piece in reversed(pieces):
            peak = max(peak, live + piece.backward_extra)
            live -= piece.released_bytes + (piece.trained_bytes if gathered else 0)
        peak = max(peak, live + more)  # the answer to the gradient is memory of its own as well
        live -= more
    return peak


def _head(cost: ModelCost, choice: Choice, shape: ShapeCost, followed: int | None, frozen: int) -> list[PieceCost]:
    """Blocks [0, s) as a client has them: nothing is trained below the first, unless the embeddings are, and of those
    from ``followed`` on, and of the ``frozen`` first, nothing at all."""
    blocks, start = list(shape.blocks), choice.cut[0]
    if not cost.config.train_embeddings:
        blocks[0] = shape.first
        if frozen:
            blocks[:frozen] = cost.at(choice.micro_batch, still=True).blocks[:frozen]
    return [
        _untrained(piece) if index < frozen or (followed is not None and index >= followed) else piece
        for index, piece in enumerate(blocks[:start])
    ]


def _untrained(piece: PieceCost) -> PieceCost:
    """A block through which a gradient goes, without one for its weights."""
    bytes_ = piece.trained_bytes
    return replace(
        piece,
        trained=0,
        trained_bytes=0,
        backward_extra=max(0, piece.backward_extra - bytes_),
        released_bytes=piece.released_bytes + bytes_,
    )
