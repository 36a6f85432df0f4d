"""Counting what runs: the bytes that are alive meanwhile, and its floating-point operations.

Both look at the kernels that torch really calls, of real tensors or of fake ones that only have shapes, so one way of
counting serves simulations (:mod:`flexp.cost.flops`: whole steps of the method that was run) and the planner
(:mod:`flexp.cost.model_cost`: every piece of a model, without a weight of it).

torch's ``FlopCounterMode`` sees the matrix products and convolutions that run, forward and backward, with whatever is
frozen, adapted, recomputed or aligned; a product of (m × k) and (k × n) is 2mkn. Attention is counted as the products
it is made of: the fused kernels of a CPU are invisible to the counter, so they are switched off meanwhile. Element-wise
work and optimisers count nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flexp.cost.skeleton import Skeleton
from flexp.models.stage import Stage


@contextmanager
def counting() -> Iterator[Callable[[], float]]:
    """Inside the ``with`` block: the floating-point operations so far."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter.get_total_flops


class _NoModules:
    """Instead of the counter's ledger by module, which cannot follow ``torch.autograd.grad``."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the ``with`` block: every storage that an operation makes counts from then until nobody holds it.

    Views count nothing of their own. What a kernel allocates for itself while it runs is not seen.

    Args:
        known: tensors that were there before, which do not count.

    Attributes:
        live: bytes alive now; ``peak``: the most since :meth:`mark`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        # A storage's address may be given again after it is freed; its entry goes with it.
        self._sizes: dict[int, int] = {}
        self._static = {storage._cdata: storage for value in known for storage in [value.untyped_storage()]}

    def mark(self) -> tuple[int, int]:
        """(live, peak) since the last mark; the next peak starts from what is live now."""
        found = self.live, self.peak
        self.peak = self.live
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._static:
            return
        size = storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            weakref.finalize(storage, self._gone, key)
        self._sizes[key] = size
        self.live += size - (before or 0)
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


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
