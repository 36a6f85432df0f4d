"""What a step of a client takes: peak memory, time, bytes and an energy proxy, from a model's cost and a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexp.cost.choice import Choice, Prediction, codec_share, form
from flexp.cost.model_cost import STATE, ModelCost, PieceCost, ShapeCost
from flexp.cost.profile import Profile
from flexp.cost.speed import Speed
from flexp.models.loading import DTYPES
from flexp.models.parts import check_cut

OVERHEAD = 20 * 2**20
"""Bytes that are no tensor, where they were not measured: a model's code, what libraries and the allocator keep."""
ADAPTERS = 6 * 2**20
"""The same of the code that only LoRA needs; :data:`CHECKPOINTING`: only checkpointing."""
CHECKPOINTING = 7 * 2**20


def predict(
    cost: ModelCost,
    profile: Profile,
    choice: Choice,
    server: Profile,
    *,
    base_depth: int | None = None,
    followed: int | None = None,
) -> Prediction:
    """Predict one step of a client.

    Args:
        cost: of the model, at the length of the client's largest exchange.
        profile: of the client's device.
        server: of the server; its links reach from the network to it.
        base_depth: s_min, when alignment sends z_base up as well; ``None``: nothing is aligned.
        followed: as for :func:`memory`. (The seconds are those of a client that trains all of its blocks.)

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.at(choice.micro_batch, choice.rank)
    base = base_depth is not None and base_depth < start
    sent = float(shape.message_bytes)
    if form(choice.codec) != "off":
        sent *= codec_share(choice.codec) * 4 / DTYPES[cost.config.dtype].itemsize
    up = choice.accumulation * round((3 if base else 2) * sent + shape.mask_bytes)
    down = choice.accumulation * round(2 * sent)
    here, there = Speed(cost, profile, choice), Speed(cost, server, choice)
    client, middle = here.client(start, stop), there.server(start, stop)
    if base and base_depth is not None:
        middle += there.forward(base_depth, start)
    link = 4 * choice.accumulation * (profile.latency_s + server.latency_s)
    link += 8 * up / min(profile.uplink_bps, server.downlink_bps)
    link += 8 * down / min(profile.downlink_bps, server.uplink_bps)
    return Prediction(
        memory_bytes=memory(cost, choice, overhead_bytes=here.overhead_bytes, base=base, followed=followed),
        step_seconds=client + middle + link,
        client_seconds=client,
        server_seconds=middle,
        link_seconds=link,
        energy_joules=profile.watts * client + profile.link_watts * link,
        bytes_up=up,
        bytes_down=down,
        server_memory_bytes=server_memory(cost, choice),
    )


def memory(
    cost: ModelCost,
    choice: Choice,
    *,
    overhead_bytes: int | None = None,
    base: bool = False,
    followed: int | None = None,
) -> int:
    """The client's peak in bytes above the bare interpreter, once the optimiser has its state.

    It depends on no device but for ``overhead_bytes`` (``None``: :data:`OVERHEAD`); ``base``: z_base is sent as well;
    ``followed``: the first block of its head that it does not train.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.at(choice.micro_batch, choice.rank, choice.checkpointing)
    head = _head(cost, shape, start, followed)
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


def resting(cost: ModelCost, choice: Choice, *, overhead_bytes: int | None = None, followed: int | None = None) -> int:
    """What the client holds between two steps: weights, optimiser state, and what is no tensor. See :func:`memory`.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.at(choice.micro_batch, choice.rank, choice.checkpointing)
    held, _ = _own(cost, shape, _head(cost, shape, start, followed), list(shape.blocks[stop:]))
    return held + overhead(choice.rank, choice.checkpointing, overhead_bytes)


def _own(cost: ModelCost, shape: ShapeCost, head: list[PieceCost], tail: list[PieceCost]) -> tuple[int, int]:
    """Bytes of the client's weights with their optimiser's state, and of those weights that it trains."""
    own = [*head, *tail, shape.head]
    trained = sum(piece.trained_bytes for piece in own)
    return sum(piece.weight_bytes for piece in own) + STATE[cost.optimizer] * trained, trained


def overhead(rank: int | None, checkpointing: bool, measured: int | None = None) -> int:
    """Bytes that are no tensor; ``measured``: on the device, with full tuning and without checkpointing."""
    base = OVERHEAD if measured is None else measured
    return base + (0 if rank is None else ADAPTERS) + (CHECKPOINTING if checkpointing else 0)


def server_memory(cost: ModelCost, choice: Choice) -> int:
    """What a server that keeps its activations holds for a client besides weights: most during the backward."""
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.at(choice.micro_batch, choice.rank)
    return _walk(shape.message_bytes + shape.mask_bytes, [], 0, list(shape.blocks[start:stop]), False)


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


def _head(cost: ModelCost, shape: ShapeCost, start: int, followed: int | None) -> list[PieceCost]:
    """Blocks [0, s) as a client has them: nothing is trained below the first, unless the embeddings are, and of those
    from ``followed`` on nothing at all."""
    blocks = list(shape.blocks) if cost.config.train_embeddings else [shape.first, *shape.blocks[1:]]
    return [
        _untrained(piece) if followed is not None and index >= followed else piece
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
