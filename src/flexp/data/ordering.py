"""Random numbers for every purpose, all following from one seed; and which examples make up which training step."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh generator for ``purpose``: equal seed and purpose give equal numbers, whatever else was drawn.

    A client's split therefore does not change when another client joins or leaves.
    """
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]))


class BatchOrder:
    """Every epoch is a fresh permutation of the examples; a resumed run asks for any step and gets the same batch.

    An epoch has ``ceil(n_examples / batch_size)`` steps; its last batch may be smaller.

    Raises:
        ValueError: ``n_examples`` or ``batch_size`` is not positive.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        if n_examples < 1 or batch_size < 1:
            raise ValueError(f"n_examples = {n_examples} and batch_size = {batch_size} must be positive")
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.arange(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is used exactly once."""
        return -(-self.n_examples // self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The examples of ``step`` (0, 1, 2, ...), at most ``batch_size`` of them and never one twice."""
        if step < 0:
            raise ValueError(f"step = {step} must not be negative")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:  # remembered for speed only
            self._epoch = epoch
            self._order = generator(self.seed, "order", epoch).permutation(self.n_examples)
        start = position * self.batch_size
        return [int(index) for index in self._order[start : start + self.batch_size]]
