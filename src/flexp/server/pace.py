"""How many requests go together (``server.joined``): as many as pay, by what was measured."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from flexp.models.stage import Stage
from flexp.server.joining import MOST_TOKENS, Member, Pass

AGAIN = 32
"""One of so many requests, at most, goes the way that seems slower, to see whether it still is."""
WORTH, FEW = 0.95, 3
"""A pass pays whose share of an exchange takes less than so much of it alone; measured so often before it is judged."""
BELIEVED = 0.9
"""The same as it is expected, before such a pass was measured."""
LEAST_TOKENS, TEXT = 16, 128
"""The curve at the start is of requests of that many tokens and more, in texts of so many at most."""
START_SECONDS = 2.0
"""For the curve at the start; but a block that is slower is run twice."""


class Pace:
    """Seconds a token, alone and in passes of many: what joining is worth here, as measured.

    Of each the median of the last few counts, so that neither a first time, which takes longer, nor what else the
    machine does for a moment decides. A pass is noted with all that it took: what waited for it backwards, too, and
    blocks that ran again, for whoever came late or since its graph had no room.

    Attributes:
        curve: seconds a token of one request, by the bits of its number of tokens, as :func:`curve_of` gives them. A
            pass that was not measured yet is expected to take what one request of as many tokens takes.
    """

    def __init__(self) -> None:
        self.curve: Mapping[int, float] = {}
        self._seconds: dict[tuple[str, int, int], deque[float]] = {}
        self._since: Counter[tuple[int, int]] = Counter()

    def note(self, kind: str, members: int, tokens: Sequence[int], seconds: float) -> None:
        """So long took the ``kind`` (forward, backward, look) of exchanges of so many tokens each, in a pass of so many
        ``members``."""
        key = kind, tokens[0].bit_length(), members.bit_length()
        self._seconds.setdefault(key, deque(maxlen=2 * FEW - 1)).append(seconds / sum(tokens))

    def most(self, tokens: int, waiting: int, *, train: bool = True) -> int:
        """How many of so many exchanges of that size are to go together: as many as pay, by powers of two. Those that
        do not ``train`` have no backward."""
        kinds = ("forward", "backward") if train else ("look",)
        size, wide = tokens.bit_length(), waiting.bit_length()
        alone = self._cost(kinds, size, 1)
        if alone is None or wide == 1:
            return 1
        costs, chosen = {members: self._cost(kinds, size, members) for members in range(2, wide + 1)}, 1
        for members, cost in costs.items():
            if cost is None:  # expected to pay at the start, or since half of it was measured to
                pays = self._expected(size, members) < BELIEVED or 1 < chosen == members - 1
            else:
                pays = cost < WORTH * alone
            chosen = members if pays else chosen
        if costs.get(chosen, alone) is not None:
            for members in {*range(1, wide + 1)} - {chosen}:
                self._since[size, members] += 1
                if self._since[size, members] >= AGAIN * wide << members:  # the more at once, the less often
                    self._since[size, members], chosen = 0, members
                    break
        return min(waiting, (1 << chosen) - 1)

    def _expected(self, size: int, members: int) -> float:
        """Of what a token takes alone, by the curve, which is taken to be level beyond its ends."""
        if not self.curve:
            return 1.0
        least, most = min(self.curve), max(self.curve)
        single = min(max(size, least), most)
        return self.curve[min(single + members - 1, most)] / self.curve[single]

    def _cost(self, kinds: Sequence[str], size: int, members: int) -> float | None:
        """Seconds a token, of all kinds; ``None``: not known yet."""
        found = [self._seconds.get((kind, size, members), ()) for kind in kinds]
        return sum(map(median, found)) if min(map(len, found)) >= FEW else None


def curve_of(stage: Stage, block: int, weights: Mapping[str, Tensor]) -> dict[int, float]:
    """Seconds a token of one block, forward and backward, by the bits of the number of tokens of a request.

    Args:
        block: the blocks of a model are alike, so one stands for all.
        weights: what is trained of it, by name.
    """
    found: dict[int, float] = {}
    began, tokens = time.perf_counter(), LEAST_TOKENS
    stage.model.train(True)
    while tokens <= MOST_TOKENS:
        length = min(tokens, TEXT)
        z_BTH = torch.ones(tokens // length, length, stage.anatomy.hidden, dtype=stage.model.dtype)
        z_BTH = z_BTH.to(stage.model.device)
        took: list[float] = []
        while len(took) < FEW and (not took or time.perf_counter() - began < START_SECONDS):
            start = time.perf_counter()
            one = Pass(stage, [Member(z_BTH, None, None, (block, block + 1), weights)], grad=True)
            one.gradients([z_BTH])[0][0].cpu()  # which waits for the device
            took.append(time.perf_counter() - start)
        found[tokens.bit_length()] = min(took) / tokens
        if time.perf_counter() - began >= START_SECONDS and len(found) > 1:
            break
        tokens *= 2
    return found
