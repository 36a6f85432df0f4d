"""What a step of a client takes: peak memory, time, bytes and an energy proxy, from a model's cost and a profile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from flexp.config import Rows
from flexp.cost.choice import Choice, Prediction, codec_share, form
from flexp.cost.model_cost import STATE, ModelCost, PieceCost, ShapeCost
from flexp.cost.profile import ModelSeconds, PieceSeconds, Profile, ShapeSeconds
from flexp.kinds import KINDS
from flexp.models.anatomy import check_cut
from flexp.models.batches import PER_TOKEN
from flexp.models.loading import DTYPES

OVERHEAD = 20 * 2**20
"""Bytes that are no tensor, where they were not measured: a model's code, what libraries and the allocator keep."""
ADAPTERS = 6 * 2**20
"""The same of the code that only LoRA needs; :data:`CHECKPOINTING`: only checkpointing."""
CHECKPOINTING = 7 * 2**20
NUMBERED = 8 + 1
"""Bytes of an example's number, and of the flag that says whether it comes along."""


def predict(
    cost: ModelCost,
    profile: Profile,
    choice: Choice,
    server: Profile,
    *,
    base_depth: int | None = None,
    followed: int | None = None,
    rows: Rows = "loss",
    read: float = 1.0,
    frozen: int = 0,
    anew: float = 1.0,
    own: bool = False,
) -> Prediction:
    """Predict one step of a client.

    Args:
        cost: of the model, at the length of the client's largest exchange.
        profile: of the client's device.
        server: of the server; its links reach from the network to it.
        base_depth: s_min, when alignment sends z_base up as well; ``None``: nothing is aligned.
        followed: as for :func:`memory`. (The seconds are those of a client that trains all of its blocks.)
        rows: ``link.rows``, of h.
        read: the share of a text's predicted tokens that have a label, of heads that answer for every token.
        frozen: so many of the first blocks are not trained.
        anew: the share of the client's steps in which its examples' z goes up and is not kept yet (``link.cache``): the
            bytes and seconds are those of the mean step. Less than 1 where it cannot be kept counts as 1.
        own: the server holds adapters of the client's own, with their optimiser's state.

    Raises:
        ConfigError: the cut does not fit the model.
    """
    start, stop = check_cut(choice.cut, cost.blocks)
    shape = cost.cut(start, choice.micro_batch, choice.rank)
    base = base_depth is not None and base_depth < start
    back = cost.config.train_embeddings or frozen < start  # whether a gradient comes down to the head
    keeps = anew < 1 and not (back or base or cost.draws or cost.after or KINDS[cost.kind].images)
    anew = anew if keeps else 1.0
    share, flags = rows_read(cost, choice, rows, read)
    sent = float(shape.message_bytes)
    if form(choice.codec) != "off":
        sent *= codec_share(choice.codec) * 4 / DTYPES[cost.config.dtype].itemsize
    numbers = NUMBERED * choice.micro_batch if keeps else 0
    up = choice.accumulation * round((anew + base + share) * sent + shape.mask_bytes + flags + numbers)
    down = choice.accumulation * round((back + share) * sent)
    here, there = Speed(cost, profile, choice, frozen, anew), Speed(cost, server, choice)
    client, middle = here.client(start, stop), there.server(start, stop)
    if base and base_depth is not None:
        middle += there.forward(base_depth, start)
    link = 4 * choice.accumulation * (profile.latency_s + server.latency_s)
    link += 8 * up / min(profile.uplink_bps, server.downlink_bps)
    link += 8 * down / min(profile.downlink_bps, server.uplink_bps)
    return Prediction(
        memory_bytes=memory(
            cost, choice, overhead_bytes=here.overhead_bytes, base=base, followed=followed, frozen=frozen
        ),
        step_seconds=client + middle + link,
        client_seconds=client,
        server_seconds=middle,
        link_seconds=link,
        energy_joules=profile.watts * client + profile.link_watts * link,
        bytes_up=up,
        bytes_down=down,
        server_memory_bytes=server_memory(cost, choice) + (adapters_bytes(cost, choice) if own else 0),
        host_bytes=resting(cost, choice, overhead_bytes=here.overhead_bytes, state=False) + 2 * shape.message_bytes,
    )


def rows_read(cost: ModelCost, choice: Choice, rows: Rows, read: float) -> tuple[float, int]:
    """The share of the rows of h that cross, and the bytes of the flags that say which; texts without padding."""
    tokens = cost.cut(choice.cut[0], choice.micro_batch, choice.rank).message_bytes // (
        DTYPES[cost.config.dtype].itemsize * cost.hidden
    )
    length = tokens // choice.micro_batch
    answers, share = KINDS[cost.kind].answers, None
    if rows == "all" or choice.cut[1] < cost.blocks:
        return 1.0, 0
    if answers not in PER_TOKEN:
        share = None if cost.pooled is None else 1 / length
    elif rows == "loss" and answers != "span":
        share = read * ((length - 1) / length if answers == "next-token" else 1.0)
    return (1.0, 0) if share is None else (share, tokens)


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


class Speed:
    """How fast ``profile`` is with ``choice``.

    Measured seconds are linear in the examples between the measured sizes; where length, rank or tuning are not those
    that were measured, they are scaled by the operations. A model that was not measured takes operations ÷ FLOP/s, as
    on the virtual clock. The ``frozen`` first blocks of a client have no backward, and run in the share ``anew`` of its
    steps.
    """

    def __init__(self, cost: ModelCost, profile: Profile, choice: Choice, frozen: int = 0, anew: float = 1.0) -> None:
        self.cost, self.profile, self.choice = cost, profile, choice
        self.frozen, self.anew = frozen, anew
        self.shape = cost.cut(choice.cut[0], choice.micro_batch, choice.rank)
        self.measured = fitting(profile.measured, cost, choice)

    @property
    def overhead_bytes(self) -> int | None:
        """Of memory that is no tensor, if it was measured."""
        return None if self.measured is None else self.measured.overhead_bytes

    def client(self, start: int, stop: int) -> float:
        """Seconds of a client's step: its pieces in every exchange, and its optimiser."""
        shape, blocks = self.shape, range(self.cost.blocks)
        own = [*blocks[:start], *blocks[stop:]]
        seconds = sum(self._ends())
        seconds += sum(self._block(index, first=index == 0) for index in own if index >= self.frozen)
        seconds += sum(self._still(index) for index in own if index < self.frozen)
        trained = shape.head.trained + sum(shape.blocks[index].trained for index in own if index >= self.frozen)
        return self.choice.accumulation * seconds + self._update(trained)

    def server(self, start: int, stop: int) -> float:
        """Seconds of a server's work for a step of such a client, which keeps its activations."""
        seconds = sum(self._block(index, own=False) for index in range(start, stop))
        seconds += 0.0 if self.measured is None else self._longer(self.measured, "embed")  # making its plan
        trained = sum(piece.trained for piece in self.shape.blocks[start:stop])
        return self.choice.accumulation * seconds + self._update(trained)

    def forward(self, start: int, stop: int) -> float:
        """Seconds of a step's forwards through blocks [start, stop)."""
        return self.choice.accumulation * sum(self._seconds(index)[0] for index in range(start, stop))

    def _block(self, index: int, *, own: bool = True, first: bool = False) -> float:
        forward, backward = self._seconds(index, first=first and not self.cost.config.train_embeddings)
        again = forward if own and self.choice.checkpointing else 0.0
        return forward + backward + again

    def _still(self, index: int) -> float:
        forward, backward = self._seconds(index)
        return self.anew * forward + (backward if self.cost.config.train_embeddings else 0.0)

    def _seconds(self, index: int, *, first: bool = False) -> tuple[float, float]:
        piece = self.shape.first if first else self.shape.blocks[index]
        if self.measured is None:
            return piece.forward_flops / self.profile.flops, piece.backward_flops / self.profile.flops
        return scaled(self._at([shape.blocks[index] for shape in self.measured.shapes]), piece)

    def _ends(self) -> Iterable[float]:
        head = self.shape.head
        if self.measured is None:
            return [(head.forward_flops + head.backward_flops) / self.profile.flops]
        measured_head = self._at([shape.head for shape in self.measured.shapes])
        return [self._longer(self.measured, "embed"), *scaled(measured_head, head)]

    def _longer(self, measured: ModelSeconds, name: str) -> float:
        """Seconds of a piece without operations, which grow with the length."""
        piece = self._at([getattr(shape, name) for shape in measured.shapes])
        return self.cost.length / measured.length * (piece.forward + piece.backward)

    def _update(self, trained: int) -> float:
        return 0.0 if self.measured is None else self.measured.update * trained

    def _at(self, pieces: list[PieceSeconds]) -> PieceSeconds:
        assert self.measured is not None
        return at_size(self.measured.shapes, pieces, self.choice.micro_batch)


def fitting(measured: Iterable[ModelSeconds], cost: ModelCost, choice: Choice) -> ModelSeconds | None:
    """What was measured on this model and types, of the nearest tuning and length; ``None`` if nothing was."""

    def distance(item: ModelSeconds) -> tuple[bool, int, int]:
        other_tuning = (item.rank is None) != (choice.rank is None)
        return other_tuning, abs((item.rank or 0) - (choice.rank or 0)), abs(item.length - cost.length)

    same = [
        item
        for item in measured
        if (item.model, item.kind, item.dtype, item.autocast)
        == (cost.fingerprint, cost.kind, cost.config.dtype, cost.config.autocast)
    ]
    return min(same, key=distance, default=None)


def at_size(shapes: list[ShapeSeconds], pieces: list[PieceSeconds], examples: int) -> PieceSeconds:
    """Linear in the examples through two sizes (the nearest below and above, where there are more), or one and zero."""
    sizes = [shape.examples for shape in shapes]
    if len(sizes) == 1:
        share = examples / sizes[0]
        return PieceSeconds(**{key: value * share for key, value in pieces[0].model_dump().items()})
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    upper = next((n for n in range(1, len(order) - 1) if sizes[order[n]] >= examples), len(order) - 1)
    low, high = order[upper - 1], order[upper]
    share = (examples - sizes[low]) / (sizes[high] - sizes[low])
    few, more = pieces[low].model_dump(), pieces[high].model_dump()
    return PieceSeconds(**{key: max(0.0, few[key] + share * (more[key] - few[key])) for key in few})


def scaled(measured: PieceSeconds, piece: PieceCost) -> tuple[float, float]:
    """Seconds forward and backward of ``piece``: as measured, times its operations ÷ those that were measured."""
    found = []
    for seconds, had, has in (
        (measured.forward, measured.forward_flops, piece.forward_flops),
        (measured.backward, measured.backward_flops, piece.backward_flops),
    ):
        found.append(seconds * has / had if had > 0 else seconds)
    return found[0], found[1]
