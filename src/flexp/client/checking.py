"""What an attacker reads of a client's texts who is given its very head: what a bound on content words is judged by."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from flexp.attacks.base import Attack, Public, Sent
from flexp.attacks.decoder import Decoder
from flexp.attacks.tokens import ATTACKS, ON_MEANS

CHECKED = 64
"""Private texts that a check attacks."""
VOCABULARY = 1 << 15
"""Tokens that its attacker knows; of a larger vocabulary those of the private texts and others by lot."""


def asked(
    private: Sequence[list[int]],
    public: Sequence[list[int]],
    vocabulary: int,
    special: Collection[int],
    draw: np.random.Generator,
) -> tuple[list[list[int]], list[list[int]]]:
    """The texts that the attacker learns from, ``public`` ones and its vocabulary in random order, and those of the
    ``private`` ones that it is asked for."""
    some = [private[number] for number in draw.permutation(len(private))[:CHECKED]]
    words = {token for ids in some for token in ids} - set(special)
    others = np.setdiff1d(np.arange(vocabulary), [*words, *special])
    more = draw.permutation(others)[: max(0, VOCABULARY - len(words))]
    flat = draw.permutation([*words, *more.tolist()]).tolist()
    length = max(map(len, some))
    shuffled = [flat[start : start + length] for start in range(0, len(flat), length)]
    return [*public, *shuffled], some


def most_read(
    known: Public, sent: Sent, ids_N: Tensor, content_N: Tensor, decoder: Decoder | None, enough: float = 1.0
) -> float:
    """The share of content words that the best attack reads which learns from ``known``: the quick ones, then the
    ``decoder``, which goes on from what it has learnt. Once more than ``enough`` are read no further one is made.

    Args:
        sent: what was sent, of which ``content_N`` are content words; ``ids_N``: the truth.
        decoder: where each token's activation is sent; ``None``: one vector of a text is.
    """
    kinds = ON_MEANS if decoder is None else ATTACKS
    quick: list[Attack] = [kind() for kind in kinds if not kind.slow]
    read = 0.0
    for attack in quick if decoder is None else [*quick, decoder]:
        read = max(read, content_read(attack, known, sent, ids_N, content_N))
        if read > enough:
            break
    return read


def content_read(attack: Attack, known: Public, sent: Sent, ids_N: Tensor, content_N: Tensor) -> float:
    """The share of content words that an attack reads which learns from ``known``."""
    attack.learn(known)
    return float((attack.read(sent, ids_N) == ids_N)[content_N].float().mean())
