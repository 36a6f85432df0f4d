"""One stream of random numbers per party, so that dropout does not depend on who else computes in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomStream:
    """A state of torch's generator that belongs to one party."""

    def __init__(self, seed: int) -> None:
        self.state: Tensor = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside the ``with`` block, and go on from there the next time."""
        with drawing_from(self.state):
            try:
                yield
            finally:
                self.state = torch.get_rng_state()


@contextmanager
def drawing_from(state: Tensor) -> Iterator[None]:
    """Draw from a copy of ``state`` inside the ``with`` block; the generator's own state is restored after it."""
    outer = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(outer)
