"""Gaussian noise that hides something: how it is drawn, and what it guarantees."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexp.errors import StorageError
from flexp.files import kept

DELTA = 1e-5
"""δ of what is told."""

BITS = 128
"""Of a key."""


def epsilon(mu: float, delta: float = DELTA) -> float:
    """ε of two gaussians of deviation 1 whose means are ``mu`` apart: the gaussian mechanism, analytically (Balle and
    Wang, 2018, arXiv 1805.06530, theorem 8). Of several releases, each of which may depend on the earlier ones, the
    squares of ``mu`` add up, exactly (Dong et al., 2019, arXiv 1905.02383).
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def over(eps: float) -> float:
        first = math.exp(log_ndtr(mu / 2 - eps / mu))
        return first - math.exp(min(eps + log_ndtr(-mu / 2 - eps / mu), 0.0)) - delta

    return 0.0 if mu == 0 or over(0.0) <= 0 else float(brentq(over, 0.0, mu * mu / 2 + 10 * mu + 10))


def secret_key() -> int:
    """A key for :func:`drawn`, of as many bits as nobody can try out."""
    return secrets.randbits(BITS)


def kept_key(file: Path, what: str) -> int:
    """The secret key in ``file``, the same whenever it is asked for: who may see many draws for one thing would average
    them.

    Raises:
        StorageError: it cannot be read as the key of ``what``, or not be written.
    """
    found = kept(file, lambda: secret_key().to_bytes(BITS // 8, "big"), f"the key of {what}")
    if len(found) != BITS // 8:
        raise StorageError(f"{file}: cannot be read as the key of {what}: it has {len(found)} bytes, not {BITS // 8}")
    return int.from_bytes(found, "big")


def drawn(shape: Sequence[int], key: int, *said: bytes) -> Tensor:
    """Standard normal numbers, float32, that follow from ``key`` and ``said`` alone.

    Their SHA-256 is key and counter of Philox (Salmon et al., 2011), all 256 bits of it. torch's generator on a
    processor keeps 32 bits of its seed, which anybody can try out.
    """
    words = np.frombuffer(hashlib.sha256(b"".join((key.to_bytes(BITS // 8, "big"), *said))).digest(), "<u8")
    numbers = np.random.Generator(np.random.Philox(key=words[:2], counter=[0, 0, *words[2:]]))
    return torch.from_numpy(numbers.standard_normal(tuple(shape), dtype=np.float32))


def key_as_tensor(key: int) -> Tensor:
    """For a state; back with :func:`key_of`."""
    return torch.tensor(list(key.to_bytes(BITS // 8, "big")), dtype=torch.uint8)


def key_of(state: Tensor) -> int:
    """The key of :func:`key_as_tensor`, or of an older state, which has a number."""
    return int.from_bytes(bytes(state.tolist()), "big") if state.dim() else int(state)
