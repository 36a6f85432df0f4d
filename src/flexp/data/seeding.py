"""Independent random numbers for every purpose, all following from one seed."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A fresh generator for ``purpose``: equal seed and purpose give equal numbers, whatever else was drawn.

    A client's split therefore does not change when another client joins or leaves.
    """
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16]))
