"""Exchanges of several clients in one pass through the blocks that they have in common.

The frozen base multiplies all rows at once. What is trained (LoRA's matrices) multiplies each client's rows by that
client's own leaf of the graph, whether all have the same numbers or, with ``server.adapters = "own"``, each its own: so
every client's gradient comes out for itself, as if it had been alone. Texts are padded to a common length under their
masks. Sums of a matrix product may run in another order than alone: that is the rounding by which answers differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexp.models.batches import ignores_padding
from flexp.models.stage import Stage
from flexp.optim import laid_out
from flexp.server.kept import counted

MOST_TOKENS = 1024
"""Of one pass, padding included: the time for which nobody else is served is bounded by it, and more gained nothing."""
MOST_PADDED = 1.25
"""Tokens of a pass, padding included, for each token without."""
PATIENCE, MOST_PATIENCE = 4.0, 0.5
"""So many times as long as a pass took, and so many seconds at most, its backwards wait for each other."""


@dataclass
class Member:
    """One client's exchange: z and h are (B, T, H), ``weights`` what it trains of blocks [s, e) = ``cut``."""

    z_BTH: Tensor
    mask_BT: Tensor | None
    positions_BT: Tensor | None
    cut: tuple[int, int]
    weights: Mapping[str, Tensor]


class Pass:
    """The blocks of all members run once, from the first's start to the last's end.

    Attributes:
        h_BTH: of each member, until gradients were taken or the graph was let go of.
        exchanges: the client and the exchange of each member.
        until: to when, on the monotonic clock, backwards wait for those of the others.
    """

    def __init__(
        self, stage: Stage, members: Sequence[Member], *, grad: bool, exchanges: Sequence[tuple[str, int]] = ()
    ) -> None:
        began = time.monotonic()
        self._stage, self._members, self.exchanges = stage, members, exchanges
        self._z_BTH = [one.z_BTH.detach().requires_grad_(grad) for one in members]
        self._leaves = [
            {name: one.weights[name].detach().requires_grad_(grad) for name in sorted(one.weights)} for one in members
        ]
        with torch.set_grad_enabled(grad), counted(stage.model) as graph:
            self.h_BTH = self._run()
        self.bytes = graph.bytes
        now = time.monotonic()
        self.until = now + min(PATIENCE * (now - began), MOST_PATIENCE)

    def free(self) -> None:
        """Let go of the graph."""
        self.h_BTH, self._z_BTH, self._leaves = [], [], []

    def _run(self) -> list[Tensor]:
        stage, members = self._stage, self._members
        length = max(one.z_BTH.shape[1] for one in members)
        masks = _masks(members, length)
        states = [_padded(z_BTH, length) for z_BTH in self._z_BTH]
        for start, stop in pairwise(sorted({end for one in members for end in one.cut})):
            here = [k for k, one in enumerate(members) if one.cut[0] <= start and stop <= one.cut[1]]
            if not here:
                continue
            rows = [states[k].shape[0] for k in here]
            hidden_BTH = torch.cat([states[k].to(stage.model.device) for k in here])
            mask_BT = None if masks is None else torch.cat([masks[k] for k in here])
            plan = stage.plan_without_inputs(hidden_BTH, mask_BT, _positions([members[k] for k in here], length))
            with _each_its_own(stage, [self._leaves[k] for k in here], rows, start, stop):
                hidden_BTH = stage.run(hidden_BTH, plan, start, stop)
            for k, own_BTH in zip(here, torch.split(hidden_BTH, rows), strict=True):
                states[k] = own_BTH
        return [own_BTH[:, : one.z_BTH.shape[1]] for own_BTH, one in zip(states, members, strict=True)]

    def gradients(self, grads_BTH: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Of each member, from ∂/∂h of each: at z, and of its own weights, by name. Once."""
        inputs = [*self._z_BTH, *(value for own in self._leaves for value in own.values())]
        given = [grad_BTH.to(h_BTH.device) for grad_BTH, h_BTH in zip(grads_BTH, self.h_BTH, strict=True)]
        found = iter(torch.autograd.grad(self.h_BTH, inputs, given, allow_unused=True))
        at_z, leaves = [next(found) for _ in self._members], self._leaves
        self.free()
        return [
            (z_BTH, {name: laid_out(value, own[name]) for name in own if (value := next(found)) is not None})
            for z_BTH, own in zip(at_z, leaves, strict=True)
        ]


def can_join(stage: Stage, trained: Mapping[str, nn.Parameter]) -> str:
    """Why several clients' exchanges cannot go through these blocks together; empty: they can."""
    if not ignores_padding(stage.model):
        return "its blocks compute the tokens of several texts together, or carry something along a text"
    modules = [stage.model.get_submodule(name.rpartition(".")[0]) for name in trained]
    if not all(type(module) is nn.Linear and "lora_" in name for module, name in zip(modules, trained, strict=True)):
        return "each client's gradient of whole weights costs as much as alone; it is for LoRA and frozen blocks"
    return ""


def fits(shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether exchanges of these (B, T) are not too many, and not too different, for one pass."""
    padded = sum(batch for batch, _ in shapes) * max(length for _, length in shapes)
    return padded <= min(MOST_TOKENS, MOST_PADDED * sum(batch * length for batch, length in shapes))


@contextmanager
def _each_its_own(
    stage: Stage, weights: Sequence[Mapping[str, Tensor]], rows: Sequence[int], start: int, stop: int
) -> Iterator[None]:
    """Inside the ``with`` block the trained layers of blocks [start, stop) multiply each member's rows by its own."""
    names = [name for name in weights[0] if stage.within(name, start, stop)]
    layers = [stage.model.get_submodule(name.rpartition(".")[0]) for name in names]
    try:
        for name, layer in zip(names, layers, strict=True):
            vars(layer)["forward"] = partial(_multiplied, [own[name] for own in weights], rows)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _multiplied(weights: Sequence[Tensor], rows: Sequence[int], x: Tensor) -> Tensor:
    """Each member's rows by its own weight, or rather a copy: that of a member that has given up may be trained before
    the others' backwards. Where a model has made rows of all tokens, each stands for as many."""
    times = x.shape[0] // sum(rows)
    if len(set(rows)) > 1:
        parts = torch.split(x, [times * count for count in rows])
        return torch.cat([functional.linear(part, own.clone()) for part, own in zip(parts, weights, strict=True)])
    each = x.reshape(len(rows), -1, x.shape[-1])
    return torch.bmm(each, torch.stack(list(weights)).transpose(1, 2)).view(*x.shape[:-1], -1)


def _masks(members: Sequence[Member], length: int) -> list[Tensor] | None:
    """The members' masks with zeros for what is filled up; ``None``: every token of all counts."""
    if all(one.mask_BT is None and one.z_BTH.shape[1] == length for one in members):
        return None
    kind = next((one.mask_BT.dtype for one in members if one.mask_BT is not None), torch.int64)
    found = []
    for one in members:
        mask_BT = one.z_BTH.new_ones(one.z_BTH.shape[:2]) if one.mask_BT is None else one.mask_BT
        found.append(functional.pad(mask_BT.to(kind), (0, length - mask_BT.shape[1])))
    return found


def _positions(members: Sequence[Member], length: int) -> Tensor | None:
    """All have theirs, or none has."""
    found = [
        functional.pad(one.positions_BT.expand(one.z_BTH.shape[0], -1), (0, length - one.positions_BT.shape[1]))
        for one in members
        if one.positions_BT is not None
    ]
    return torch.cat(found) if found else None


def _padded(z_BTH: Tensor, length: int) -> Tensor:
    return functional.pad(z_BTH, (0, 0, 0, length - z_BTH.shape[1]))
