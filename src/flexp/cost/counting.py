"""Running a skeleton's pieces, forward and backward, and noting what each of them holds and computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexp.cost.flops import counting
from flexp.cost.ledger import Ledger
from flexp.cost.skeleton import Skeleton
from flexp.models.stage import Stage

Note = tuple[int, int, float]
"""(live bytes, peak bytes since the note before, operations so far)."""


@dataclass(frozen=True)
class Counted:
    """What one piece did: bytes and operations, as in :class:`flexp.cost.model_cost.PieceCost`."""

    kept: int
    forward_extra: int
    backward_extra: int
    released: int  # by its backward, its gradients not counted against it
    forward_flops: float
    backward_flops: float


def count_pieces(
    skeleton: Skeleton, chosen: list[int], kind: str, examples: int, length: int, *, below: bool
) -> tuple[Counted, list[Counted], Counted]:
    """Embeddings, the ``chosen`` blocks one after the other, and the head with its loss.

    Args:
        below: whether something is trained before the first of the blocks, so that it needs a gradient at its input.
    """
    bytes_ = _run(skeleton, chosen, kind, examples, length, below, flops=False)
    flops = _run(skeleton, chosen, kind, examples, length, below, flops=True)
    pieces = []
    last = len(bytes_) - 1
    for index in range(len(chosen) + 2):
        forward, backward = index + 1, last - index
        start, end = bytes_[forward - 1], bytes_[forward]
        first, done = bytes_[backward - 1], bytes_[backward]
        pieces.append(
            Counted(
                kept=end[0] - start[0],
                forward_extra=max(0, end[1] - end[0]),
                backward_extra=max(0, done[1] - first[0]),
                released=first[0] - done[0],
                forward_flops=flops[forward][2] - flops[forward - 1][2],
                backward_flops=flops[backward][2] - flops[backward - 1][2],
            )
        )
    return pieces[0], pieces[1:-1], pieces[-1]


def _run(
    skeleton: Skeleton, chosen: list[int], kind: str, examples: int, length: int, below: bool, *, flops: bool
) -> list[Note]:
    """Notes: at the beginning, after each piece's forward, and after each piece's backward."""
    stage = skeleton.stage
    notes: list[Note] = []
    for value in stage.model.parameters():
        value.grad = None
    with skeleton.mode:
        batch = skeleton.batch(kind, examples, length)
        known = [*stage.model.parameters(), *stage.model.buffers(), *batch.values()]
        ledger = Ledger(known)
        counter: Any = counting() if flops else nullcontext(lambda: 0.0)
        with counter as operations, ledger if not flops else nullcontext():

            def note(_: Any = None) -> None:
                notes.append((*ledger.mark(), operations()))

            note()
            loss = noted_forward(stage, chosen, batch, note, below=below)
            note()
            torch.autograd.backward(loss)
            del loss
            note()
            while len(notes) < 2 * len(chosen) + 5:  # what is frozen below has no backward
                note()
    for value in stage.model.parameters():
        value.grad = None
    return notes


def noted_forward(
    stage: Stage, chosen: list[int], batch: Mapping[str, Tensor], note: Callable[..., None], *, below: bool
) -> Tensor:
    """The loss of a batch through the ``chosen`` blocks alone.

    ``note`` is called once embeddings, each block and the head are through, but for the last, and again in the backward
    once the head, each block and, where they are trained, the embeddings are.
    """
    hidden_BTH, plan = stage.plan(batch)
    if below and not hidden_BTH.requires_grad:
        hidden_BTH = hidden_BTH.detach().requires_grad_()
    note()
    for index in chosen:
        if hidden_BTH.requires_grad:
            hidden_BTH.register_hook(note)  # type: ignore[no-untyped-call]
        hidden_BTH = stage.run(hidden_BTH, plan, index, index + 1)
        note()
    if not hidden_BTH.requires_grad:
        hidden_BTH.requires_grad_()
    hidden_BTH.register_hook(note)  # type: ignore[no-untyped-call]
    loss: Tensor = stage.finish(hidden_BTH, batch, plan).loss
    return loss
