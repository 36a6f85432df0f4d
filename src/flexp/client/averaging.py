"""Averages of clients' weights, w ← Σ n_k w_k / Σ n_k, as sums over clients (:mod:`flexp.links.sums`).

Each client gives its share s_k = n_k/n and s_k·w_k, in steps of 2⁻⁵² (:data:`flexp.masking.SHARES`). These integers add
up to the same whatever their order and their masks, and a simulation adds the same ones. An average is off by at most
half a step for each client: of float32 weights above 2⁻²⁹ (2·10⁻⁹) those of one client come back as they were. Weights
must be below 1,024.

A model is large: it crosses in pieces, and each piece is the average of those who have given that one; where none of
them has a share, everybody keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexp.client.adding import OverLink
from flexp.errors import LinkError, TrainingError
from flexp.links import asking
from flexp.links.asking import PIECES
from flexp.links.sums import fixed, real
from flexp.masking import SHARES

FINE = 2.0**-20
"""What numbers of examples are multiples of in their sum."""

ROUNDING = 2.0**-30
"""Of the shares of all clients, by which they may not come to 1."""

MASKED = "weights are averaged in masked sums, which the server adds and cannot read"
READABLE = "method.meet.masked is off: the server reads every client's weights, and what they tell of its examples"

Weights = dict[str, Tensor]


class Mean:
    """The mean of clients that are all in this process, of each tensor over those who have it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, weights: Mapping[str, Tensor], share: float) -> None:
        """One client's; ``share``: n_k/n. Raises TrainingError: a weight is not finite or too large."""
        whole = _whole(share)
        for name, value in weights.items():
            _check(value)
            given = fixed(value.detach().cpu().double() * whole, SHARES), fixed(whole, SHARES)
            before = self._sums.get(name)
            self._sums[name] = given if before is None else (before[0] + given[0], before[1] + given[1])

    def take(self) -> Weights:
        """What it comes to, in double precision; then it begins anew."""
        sums, self._sums = self._sums, {}
        return {name: real(value, SHARES) / real(shares, SHARES) for name, (value, shares) in sums.items()}


def averaged(weights: Mapping[str, Tensor], examples: int, adder: OverLink, number: int) -> Weights:
    """This client's weights and those of all others that give theirs, averaged; on the CPU. Who is too late to say how
    many examples it has gives nothing to the average, and takes it.

    Args:
        weights: alike at all clients.
        examples: n_k.
        adder: of shares.
        number: of the average, from 1.

    Raises:
        TrainingError: a weight is not finite or too large.
        LinkError: the server gives what is no average of shares.
    """
    kinds = {value.dtype for value in weights.values()}
    flat_N = torch.cat([value.detach().cpu().flatten() for value in weights.values()])  # a copy
    flat_N = flat_N.double() if len(kinds) > 1 else flat_N
    _check(flat_N)
    own = torch.tensor([examples * FINE], dtype=torch.float64)
    everybody = adder.give(number * PIECES, {"examples": own})()["examples"]
    if adder.late:
        own = torch.zeros_like(own)
    if not float(own) <= float(everybody) or not float(everybody) > 0:
        raise LinkError(
            f"the server says that all clients have {float(everybody) / FINE:g} examples; this has {examples}"
        )
    share = _whole(float(own / everybody))
    for place, piece_N in enumerate(torch.split(flat_N, asking.PIECE), 1):
        total = adder.give(number * PIECES + place, {"share": share, "weights": piece_N.double() * share})()
        shares = float(total["share"])
        given = bool(share) and not adder.late  # its own share is in it
        if not (0.0 if given else -ROUNDING) < shares < 1.0 + ROUNDING:
            raise LinkError(f"the server gives an average of {shares:g} of all examples, expected up to 1")
        if shares > 0.0:  # else of nobody who has said in time how many examples it has
            piece_N.copy_(total["weights"] / total["share"])
    parts = torch.split(flat_N, [value.numel() for value in weights.values()])
    return {
        name: part.reshape(value.shape).to(value.dtype)
        for (name, value), part in zip(weights.items(), parts, strict=True)
    }


def _whole(share: float) -> Tensor:
    """A share as a whole number of steps, as it is given, so that equals average to equals; (1,)."""
    return real(fixed(torch.tensor([share], dtype=torch.float64), SHARES), SHARES)


def _check(weights: Tensor) -> None:
    if weights.numel() and not float(weights.detach().abs().max()) < SHARES.largest:  # nor is NaN
        raise TrainingError(
            f"an average takes finite weights below {SHARES.largest:.0f}, and there are others; lower the learning "
            'rates, or train adapters (model.tuning = "lora")'
        )
