"""How long a device takes: by seconds that were measured on it, else by operations."""

from __future__ import annotations

from collections.abc import Iterable

from flexp.cost.choice import Choice
from flexp.cost.model_cost import ModelCost, PieceCost
from flexp.cost.profile import ModelSeconds, PieceSeconds, Profile, ShapeSeconds


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
